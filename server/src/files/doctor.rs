//! `blktapd doctor`.
