//! Memory that others can change while we look at it.
