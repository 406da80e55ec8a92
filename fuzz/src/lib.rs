//! What the fuzz targets stand on: the small world of hw-model's own tests.

#[path = "../../hw-model/tests/rc/victim.rs"]
pub mod victim;
#[path = "../../hw-model/tests/rc/world.rs"]
pub mod world;
