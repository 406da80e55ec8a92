//! Whole-system tests: real process memory, the model device, everything between.

mod bad_input;
mod bed;
mod cache;
mod checks;
mod dma;
mod dmabuf;
mod fail_nth;
mod faults;
mod gate;
mod huge;
mod implicit;
mod invariants;
mod messages;
mod object_verbs;
mod objects;
mod overlay;
mod pins;
mod policies;
mod races;
mod remapped;
mod rereg;
mod smoke;
