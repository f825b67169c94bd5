//! The cache protocol as an explicit-state model.

mod key;
mod protocol;
mod reader;
mod scenarios;
mod sound;
mod state;
mod system;
mod transactions;
mod weakened;
mod writer;
