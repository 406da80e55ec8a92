//! Whole-system tests: real process memory, the model device, everything between.

mod bed;
mod smoke;
