//! Regions over any pages.
