//! The HCA end to end over plain memory: two hosts, one fabric, hand-filled page lists.

mod faults;
mod transfer;
mod world;
