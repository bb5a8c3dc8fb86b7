//! How much memory a QEMU command line gives its guest, and whether it can be shared.

use std::ffi::OsString;

use super::{Failure, has_item};

/// Memory of a guest where no `-m` says how much (QEMU, hw/core/machine.c): bytes.
const DEFAULT_BYTES: u64 = 128 << 20;

/// Bytes of memory to make shareable; `None` where the arguments have a backend for it themselves.
///
/// # Errors
/// Their backend is not shared, or the size is none.
pub(super) fn to_share(arguments: &[OsString]) -> Result<Option<u64>, Failure> {
    let items = |key: &str| {
        arguments.iter().any(|argument| {
            let text = argument.to_string_lossy();
            text.split(',').any(|item| item.starts_with(key))
        })
    };
    let names_backend = items("memory-backend=") || items("memdev=");
    if names_backend {
        if arguments
            .iter()
            .any(|argument| has_item(argument, "share=on"))
        {
            return Ok(None);
        }
        return Err(Failure::because(
            "--vhost-user needs the guest's memory to be shared: add share=on to its memory backend \
             (-object memory-backend-memfd,...,share=on)",
        ));
    }
    let mut bytes = DEFAULT_BYTES;
    for pair in arguments.windows(2) {
        if pair[0] == "-m" || pair[0] == "--m" {
            let text = pair[1].to_string_lossy();
            if let Some(size) = size_of(&text) {
                bytes = parse(size).ok_or_else(|| {
                    Failure::because(format!("-m {text}: {size:?} is no amount of memory"))
                })?;
            }
        }
    }
    Ok(Some(bytes))
}

/// The size in `-m 1G`, `-m size=1G,slots=2` or `-m slots=2,size=1G`.
fn size_of(text: &str) -> Option<&str> {
    text.split(',').enumerate().find_map(|(place, item)| {
        match (item.strip_prefix("size="), place, item.contains('=')) {
            (Some(size), _, _) => Some(size),
            (None, 0, false) => Some(item),
            _ => None,
        }
    })
}

/// Mebibytes unless a suffix says otherwise (qemu(1), -m).
fn parse(size: &str) -> Option<u64> {
    let digits = size.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match &size[digits.len()..] {
        "" | "m" | "M" => 20,
        "b" | "B" => 0,
        "k" | "K" => 10,
        "g" | "G" => 30,
        "t" | "T" => 40,
        _ => return None,
    };
    let number: u64 = digits.parse().ok()?;
    number.checked_mul(1 << shift).filter(|&bytes| bytes != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_as_qemu_reads_them() {
        let bytes = |arguments: &[&str]| {
            let arguments: Vec<OsString> = arguments.iter().map(Into::into).collect();
            to_share(&arguments).ok().flatten()
        };
        assert_eq!(bytes(&[]), Some(DEFAULT_BYTES));
        assert_eq!(bytes(&["-m", "512"]), Some(512 << 20));
        assert_eq!(bytes(&["-m", "2G"]), Some(2 << 30));
        assert_eq!(bytes(&["-m", "size=96M,slots=1"]), Some(96 << 20));
        assert_eq!(bytes(&["-m", "slots=1,size=1G,maxmem=2G"]), Some(1 << 30));
        assert_eq!(bytes(&["-m", "1G,slots=1,maxmem=2G"]), Some(1 << 30));
        for bad in ["x", "1X", "0", "size=", "99999999999999T"] {
            assert_eq!(bytes(&["-m", bad]), None, "{bad}");
        }
    }
}
