//! What an image means: pure codecs and grammar, one driver per format.
//!
//! May import: no executor, no sockets, nothing of the project. Must never: move a guest's payload, or know who asks.
