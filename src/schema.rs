//! The JSON schemas in docs/ are made from the types that are printed, and held against them by a test of each.

/// Holds docs/NAME.schema.json against `schema`. To write it anew: `BLESS=1 cargo test -p anypage schema`.
///
/// # Panics
/// If they differ.
pub(crate) fn check(name: &str, schema: &schemars::Schema) {
    let path = format!("{}/docs/{name}.schema.json", env!("CARGO_MANIFEST_DIR"));
    let text = serde_json::to_string_pretty(schema).expect("a schema is JSON") + "\n";
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(&path, &text).expect("docs/ can be written");
    }
    let documented = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(documented, text, "{path} is out of date");
}
