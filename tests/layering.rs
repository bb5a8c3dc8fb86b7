//! The layer table in `src/lib.rs`, checked against the sources: who imports whom, what the pure
//! layers may not name, where `unsafe` may stand, and that table and modules agree.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Imports that the table forbids and the design allows.
const EXCEPTIONS: &[(&str, &str, &str)] = &[
    ("*", "config", "plain data"),
    (
        "nat",
        "sys::arena",
        "the memory of TCP rings: an allocator, no I/O",
    ),
];

/// Layers that run under a virtual clock and without a kernel.
const PURE_LAYERS: &[&str] = &["bytes", "logic"];

/// What code of a pure layer may not name: fds, sockets, threads, clocks, system calls.
const IMPURE: &[&str] = &[
    "libc",
    "rustix",
    "tokio",
    "tun_tap",
    "crossbeam_channel",
    "std::os",
    "std::fs",
    "std::process",
    "std::thread",
    "OwnedFd",
    "BorrowedFd",
    "RawFd",
    "AsFd",
    "UdpSocket",
    "TcpStream",
    "TcpListener",
    "UnixStream",
    "UnixDatagram",
    "SystemTime",
    "Instant::now",
    "std::time::Instant",
];

struct Source {
    path: PathBuf,
    /// Top-level module; `None` for lib.rs and main.rs.
    module: Option<String>,
    /// Without comments, literals and unit tests.
    code: String,
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut paths = Vec::new();
    collect(&root, &mut paths);
    paths.sort();
    let source = |path: PathBuf| {
        let text = fs::read_to_string(&path).unwrap();
        let path = path.strip_prefix(&root).unwrap().to_owned();
        let top = path
            .components()
            .next()
            .unwrap()
            .as_os_str()
            .to_str()
            .unwrap();
        let module = top.strip_suffix(".rs").unwrap_or(top).to_owned();
        let module = Some(module).filter(|module| module != "lib" && module != "main");
        Source {
            path,
            module,
            code: without_unit_tests(&bare(&text)),
        }
    };
    paths
        .into_iter()
        .filter(|path| !is_test_file(path))
        .map(source)
        .collect()
}

fn collect(folder: &Path, paths: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, paths);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            paths.push(path);
        }
    }
}

/// `x/tests.rs` and what lies in `x/tests/` are unit tests too long for the end of `x.rs`.
fn is_test_file(path: &Path) -> bool {
    path.components()
        .any(|part| part.as_os_str() == "tests" || part.as_os_str() == "tests.rs")
}

/// The code with comments gone and string and character literals emptied.
fn bare(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut code = String::new();
    let mut at = 0;
    while at < bytes.len() {
        let rest = &text[at..];
        let skipped = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            block_comment(rest)
        } else if rest.starts_with('"') {
            quoted(rest)
        } else if let Some(len) = raw_string(rest, code.chars().next_back()) {
            len
        } else {
            character(rest).unwrap_or_default()
        };
        if skipped == 0 {
            let next = rest.chars().next().unwrap();
            code.push(next);
            at += next.len_utf8();
        } else {
            code.push(' ');
            at += skipped;
        }
    }
    code
}

fn block_comment(rest: &str) -> usize {
    let mut depth = 0;
    let mut at = 0;
    while at < rest.len() {
        match rest.as_bytes().get(at..at + 2) {
            Some(b"/*") => (depth, at) = (depth + 1, at + 2),
            Some(b"*/") => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            return at;
        }
    }
    rest.len()
}

fn quoted(rest: &str) -> usize {
    let mut escaped = false;
    for (at, byte) in rest.bytes().enumerate().skip(1) {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => return at + 1,
            _ => {}
        }
    }
    rest.len()
}

fn raw_string(rest: &str, before: Option<char>) -> Option<usize> {
    if before.is_some_and(|c| is_word(c) && c != 'b' && c != 'c') {
        return None;
    }
    let hashes = rest.strip_prefix('r')?;
    let fence = &hashes[..hashes.len() - hashes.trim_start_matches('#').len()];
    let inside = hashes[fence.len()..].strip_prefix('"')?;
    let end = format!("\"{fence}");
    Some(
        inside
            .find(&end)
            .map_or(rest.len(), |at| 1 + fence.len() + 1 + at + end.len()),
    )
}

/// A character literal, not a lifetime.
fn character(rest: &str) -> Option<usize> {
    let inside = rest.strip_prefix('\'')?;
    if inside.starts_with('\\') {
        return Some(1 + 2 + inside[2..].find('\'')? + 1);
    }
    let first = inside.chars().next()?;
    inside[first.len_utf8()..]
        .starts_with('\'')
        .then_some(first.len_utf8() + 2)
}

/// Cuts `#[cfg(test)] mod x { ... }` and test-only items out: tests may use threads and clocks.
fn without_unit_tests(code: &str) -> String {
    const MARK: &str = "#[cfg(test)]";
    let mut kept = String::new();
    let mut rest = code;
    while let Some(at) = rest.find(MARK) {
        kept.push_str(&rest[..at]);
        rest = &rest[at + MARK.len()..];
        rest = &rest[item_len(rest)..];
    }
    kept + rest
}

/// Length of the item that `rest` starts with: to its `;`, or to the end of its braces.
fn item_len(rest: &str) -> usize {
    let mut depth = 0;
    for (at, c) in rest.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ';' if depth == 0 => return at + 1,
            _ => continue,
        }
        if depth == 0 {
            return at + 1;
        }
    }
    rest.len()
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Places where `name` stands as a path or word of its own.
fn occurrences<'a>(code: &'a str, name: &'a str) -> impl Iterator<Item = usize> + 'a {
    code.match_indices(name)
        .map(|(at, _)| at)
        .filter(move |&at| {
            let before = code[..at].chars().next_back();
            let after = code[at + name.len()..].chars().next();
            !before.is_some_and(is_word) && !after.is_some_and(is_word)
        })
}

/// All paths below the crate's root that a module names, as far as two segments: `frame::Mac`.
fn imports(source: &Source) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let depth = source.path.components().count();
    // From a submodule, enough `super`s lead to the root as well.
    let climb = vec!["super"; depth].join("::");
    let climb_more = format!("{climb}::super");
    for root in ["crate", "lanlet", climb.as_str(), climb_more.as_str()] {
        for at in occurrences(&source.code, root) {
            let rest = &source.code[at + root.len()..];
            let from_super = source.code[..at].trim_end().ends_with("super::");
            if let Some(tree) = rest.trim_start().strip_prefix("::")
                && !from_super
                && !tree.trim_start().starts_with("super")
            {
                leaves(tree, "", 2, &mut found);
            }
        }
    }
    found
}

/// Expands the use tree that `rest` starts with into paths of at most `depth` segments.
fn leaves(rest: &str, prefix: &str, depth: usize, found: &mut BTreeSet<String>) {
    let rest = rest.trim_start();
    if let Some(group) = rest.strip_prefix('{') {
        return members(group)
            .iter()
            .for_each(|member| leaves(member, prefix, depth, found));
    }
    let len = rest.find(|c: char| !is_word(c)).unwrap_or(rest.len());
    let segment = &rest[..len];
    let path = match (prefix, segment) {
        (_, "" | "self") => prefix.to_owned(),
        ("", _) => segment.to_owned(),
        _ => format!("{prefix}::{segment}"),
    };
    match rest[len..].trim_start().strip_prefix("::") {
        Some(tree) if depth > 1 => leaves(tree, &path, depth - 1, found),
        _ => drop(found.insert(path)),
    }
}

/// The comma-separated members of a brace group, its opening brace already cut off.
fn members(group: &str) -> Vec<&str> {
    let (mut members, mut start, mut depth) = (Vec::new(), 0, 0);
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => {
                members.push(&group[start..at]);
                break;
            }
            '}' => depth -= 1,
            ',' if depth == 0 => {
                members.push(&group[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    members.retain(|member| !member.trim().is_empty());
    members
}

/// Module → (rank of its layer, name of its layer), from the table in lib.rs.
fn layers() -> BTreeMap<String, (usize, String)> {
    let lib = include_str!("../src/lib.rs");
    let rows = lib
        .lines()
        .skip_while(|line| !line.starts_with("//! | layer | modules |"))
        .skip(2);
    let rows = rows.take_while(|line| line.starts_with("//! |"));
    let mut layers = BTreeMap::new();
    for (rank, row) in rows.enumerate() {
        let cells: Vec<_> = row.split('|').map(str::trim).collect();
        for module in cells[2].split(", ") {
            let module = module.trim_matches(|c| "[]`".contains(c));
            let before = layers.insert(module.to_owned(), (rank, cells[1].to_owned()));
            assert!(before.is_none(), "{module} is listed twice");
        }
    }
    assert!(
        layers.len() > 10,
        "the layer table of lib.rs was not found: {layers:?}"
    );
    layers
}

fn is_exception(module: &str, import: &str) -> bool {
    EXCEPTIONS.iter().any(|&(from, to, _)| {
        let below = import
            .strip_prefix(to)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with("::"));
        below && (from == "*" || from == module)
    })
}

#[test]
fn imports_go_down_only() {
    let layers = layers();
    let mut wrong = Vec::new();
    let mut checked = 0;
    for source in sources() {
        let Some(module) = &source.module else {
            continue;
        };
        let (rank, layer) = &layers[module];
        for import in imports(&source) {
            let target = import.split("::").next().unwrap();
            // Macros and constants of the root itself belong to no layer.
            let Some((target_rank, target_layer)) = layers.get(target) else {
                continue;
            };
            checked += 1;
            if target_rank > rank && !is_exception(module, &import) {
                let path = source.path.display();
                wrong.push(format!("{path} ({layer}) names {import} ({target_layer})"));
            }
        }
    }
    assert!(checked > 20, "only {checked} imports were found");
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn pure_layers_name_no_fd_socket_thread_or_clock() {
    let layers = layers();
    let mut wrong = Vec::new();
    for source in sources() {
        let pure = source
            .module
            .as_ref()
            .is_some_and(|module| PURE_LAYERS.contains(&&*layers[module].1));
        for name in IMPURE.iter().filter(|_| pure) {
            if occurrences(&source.code, name).next().is_some() {
                wrong.push(format!("{} names {name}", source.path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn unsafe_stands_in_sys_alone() {
    let outside_sys = |source: &Source| source.module.as_deref() != Some("sys");
    for source in sources().iter().filter(|source| outside_sys(source)) {
        for name in ["unsafe", "unsafe_code"] {
            let found = occurrences(&source.code, name).next();
            assert_eq!(found, None, "{} has {name}", source.path.display());
        }
    }
}

#[test]
fn table_and_modules_agree() {
    let layers = layers();
    let lib = bare(include_str!("../src/lib.rs"));
    let declared: BTreeSet<String> = lib
        .split(';')
        .filter_map(|item| item.trim().strip_prefix("pub mod "))
        .map(str::to_owned)
        .collect();
    let present: BTreeSet<String> = sources()
        .into_iter()
        .filter_map(|source| source.module)
        .collect();
    assert_eq!(
        present, declared,
        "files in src/ and `pub mod` lines of lib.rs"
    );
    let listed: BTreeSet<String> = layers.into_keys().collect();
    assert_eq!(
        present, listed,
        "files in src/ and the layer table of lib.rs"
    );
}

/// The reader of sources itself.
#[test]
fn the_scanner_sees_what_the_compiler_sees() {
    let text = r##"
        use crate::{frame::{self, Mac}, offload::*, wire::checksum::{sum, fold}};
        // crate::comment::x
        /* crate::a /* nested */ crate::b */
        const S: &str = "crate::string \" crate::x";
        const R: &str = r#"crate::raw " crate::y"#;
        const C: char = '"'; const L: &'static u8 = &b'\'';
        fn f() { crate::stats::count(); xcrate::no(); super::super::port::open() }
        #[cfg(test)]
        mod tests { use crate::worker; fn g() { { } } }
        #[cfg(test)]
        use crate::cli::x;
        use lanlet::nat;
    "##;
    let path = PathBuf::from("switch/mac_table.rs");
    let code = without_unit_tests(&bare(text));
    let source = Source {
        path,
        module: Some("switch".to_owned()),
        code,
    };
    let found: Vec<_> = imports(&source).into_iter().collect();
    let expected = [
        "frame",
        "frame::Mac",
        "nat",
        "offload",
        "port::open",
        "stats::count",
        "wire::checksum",
    ];
    assert_eq!(found, expected);
    let words: Vec<_> = occurrences("libc libcx x::libc::y", "libc").collect();
    assert_eq!(words, [0, 14]);
    assert!(is_exception("nat", "sys::arena") && is_exception("wire", "config"));
    assert!(!is_exception("nat", "sys::arena2") && !is_exception("nat", "sys"));
    assert!(!is_exception("wire", "sys::arena"));
}
