//! The HCA end to end over plain memory: two hosts, one fabric, hand-filled page lists.

mod atomic;
mod attributes;
mod burst;
mod completion;
mod device_memory;
mod epoch;
mod fast;
mod faults;
mod hostile;
mod implicit;
mod indirect;
mod links;
mod loans;
mod refusals;
mod rereg;
mod send;
mod shm;
mod threads;
mod transfer;
mod transport;
mod udp;
mod victim;
mod window;
mod world;
