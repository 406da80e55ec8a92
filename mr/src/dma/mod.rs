//! The DMA layer: where mappings lie.

pub mod iova;
