//! What the documents say of the code holds: tests that they name exist.

use std::fs;
use std::path::Path;

fn sources(directory: &Path, text: &mut String) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, text);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            text.push_str(&fs::read_to_string(&path).unwrap());
        }
    }
}

#[test]
fn every_requirement_in_the_tables_has_the_tests_it_names_and_none_is_left_out() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let tables = fs::read_to_string(root.join("docs/nat.md")).unwrap();
    let mut code = String::new();
    sources(&root.join("src"), &mut code);
    let named: Vec<_> = tables
        .split('`')
        .skip(1)
        .step_by(2)
        .filter(|word| word.starts_with("rfc"))
        .collect();
    assert!(named.len() > 30, "{}", named.len());
    for name in &named {
        assert!(code.contains(&format!("fn {name}()")), "{name} is no test");
    }
    for part in code.split("\nfn rfc").skip(1) {
        let Some((name, _)) = part.split_once("()") else {
            continue;
        };
        let name = format!("rfc{name}");
        if name.starts_with("rfc4787") || name.starts_with("rfc5382") || name.starts_with("rfc5508")
        {
            assert!(named.contains(&name.as_str()), "{name} is in no table");
        }
    }
}
