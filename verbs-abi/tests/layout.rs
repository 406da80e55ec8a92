//! The C structs of `abi` against the header of the machine, if it has one: size of each, offset of each field.
//!
//! What would be wrong if this failed: a program would read one field where we wrote another.

use std::fmt::Write;
use std::fs;
use std::process::Command;
use verbs_abi::abi::layouts;

const HEADER: &str = "/usr/include/infiniband/verbs.h";
/// The fields of structs that have grown since the oldest header: ours have them all.
const NEWER: [(&str, &str); 1] = [("struct ibv_qp_ex", "wr_flush")];

#[test]
fn every_struct_has_the_size_and_the_offsets_of_the_header() {
    let Ok(header) = fs::read_to_string(HEADER) else {
        println!("SKIPPED every_struct_has_the_size_and_the_offsets_of_the_header: no {HEADER}");
        return;
    };
    let mut program = "#include <stddef.h>\n#include <stdio.h>\n#include <time.h>\n#include <infiniband/verbs.h>\nint main(void) {\n".to_owned();
    let mut expected = String::new();
    for layout in layouts() {
        let name = layout.name;
        let grown = NEWER.iter().any(|(of, field)| *of == name && !header.contains(field));
        if !grown {
            writeln!(program, r#"printf("{name}: %zu\n", sizeof({name}));"#).expect("a string grows");
            writeln!(expected, "{name}: {}", layout.size).expect("a string grows");
        }
        for (field, offset) in layout.fields {
            let field = field.trim_start_matches("r#").replace("abi_placeholder", "ABI_placeholder");
            if grown && NEWER.contains(&(name, &field)) {
                continue;
            }
            writeln!(program, r#"printf("{name}.{field}: %zu\n", offsetof({name}, {field}));"#)
                .expect("a string grows");
            writeln!(expected, "{name}.{field}: {offset}").expect("a string grows");
        }
    }
    program.push_str("return 0; }\n");
    let folder = tempfile::tempdir().expect("a folder");
    let (source, binary) = (folder.path().join("layout.c"), folder.path().join("layout"));
    fs::write(&source, program).expect("a file");
    let compiled = Command::new("cc").arg("-o").arg(&binary).arg(&source).output().expect("a C compiler");
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    let said = Command::new(&binary).output().expect("the program runs").stdout;
    let said = String::from_utf8(said).expect("text");
    let wrong: Vec<_> = expected.lines().zip(said.lines()).filter(|(ours, theirs)| ours != theirs).collect();
    assert!(wrong.is_empty() && expected.lines().count() == said.lines().count(), "ours, theirs: {wrong:#?}");
    assert!(
        expected.lines().count() > 400,
        "only {} sizes and offsets were compared",
        expected.lines().count()
    );
}
