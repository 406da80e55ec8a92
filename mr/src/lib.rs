//! Regions over any pages.

pub mod dma;
