#![doc = include_str!("../README.md")]

#[cfg(feature = "catalog")]
pub mod catalog;
mod condition;
#[cfg(feature = "catalog")]
pub mod coverage;
mod expansion;
mod file;
mod image;
mod known;
mod lock;
mod problem;
mod table;
mod template;
#[cfg(feature = "catalog")]
pub mod triggers;

pub use condition::Condition;
pub use expansion::{Expansion, MissingValue, RefusedKey};
pub use file::Rules;
pub use image::{Cell, Image, InvalidImage, JsonImage};
pub use known::{Known, Unknown};
pub use lock::{Lock, LockError};
pub use problem::{Problem, RulesError};
pub use table::{At, Expand, OnTruncate, TableRules};
pub use template::{InvalidTemplate, Part, Template};

/// Settings a session must have for the text of its values to be what keys are made of. The functions of the triggers have
/// them; a reader of the write-ahead log sets them on its connection.
pub const PINNED_SETTINGS: [(&str, &str); 2] = [("DateStyle", "ISO, MDY"), ("TimeZone", "UTC")];
