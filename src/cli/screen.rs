//! Text that has to fit a terminal.

use std::io::IsTerminal;

/// Columns of the terminal at standard output; `None`: it is none.
pub(super) fn columns() -> Option<usize> {
    let stdout = std::io::stdout();
    if !stdout.is_terminal() {
        return None;
    }
    let size = rustix::termios::tcgetwinsize(&stdout).ok()?;
    Some(usize::from(size.ws_col)).filter(|&columns| columns != 0)
}

/// The text with its lines cut off to so many columns.
pub(super) fn cut(text: &str, columns: usize) -> String {
    let line = |line: &str| match line.char_indices().nth(columns) {
        None => format!("{line}\n"),
        Some(_) => {
            let kept: String = line.chars().take(columns.saturating_sub(1)).collect();
            format!("{kept}…\n")
        }
    };
    text.lines().map(line).collect()
}

/// A span of time in its largest unit: `5s`, `41m`, `3h`, `2d`.
pub(super) fn age(secs: u64) -> String {
    match secs {
        ..60 => format!("{secs}s"),
        60..3600 => format!("{}m", secs / 60),
        3600..86_400 => format!("{}h", secs / 3600),
        _ => format!("{}d", secs / 86_400),
    }
}

/// A count in at most four characters: `999`, `1.2K`, `17M`.
pub(super) fn short(count: u64, unit: u32) -> String {
    let (mut value, mut letters) = (count as f64, "KMGTPE".chars());
    let mut letter = None;
    // What would be rounded up to a unit is written as one.
    while value >= if letter.is_none() { 1000.0 } else { 999.5 } {
        value /= f64::from(unit);
        letter = letters.next();
    }
    match letter {
        None => count.to_string(),
        Some(letter) if value < 9.95 => format!("{value:.1}{letter}"),
        Some(letter) => format!("{value:.0}{letter}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_cut_and_spans_rounded_down() {
        assert_eq!(cut("abc\nabcdé\n", 4), "abc\nabc…\n");
        assert_eq!(cut("abcd\n", 4), "abcd\n");
        let spans = [0, 59, 60, 3599, 3600, 86_399, 86_400, 86_400 * 400].map(age);
        assert_eq!(spans, ["0s", "59s", "1m", "59m", "1h", "23h", "1d", "400d"]);
    }

    #[test]
    fn counts_are_short() {
        let bytes = [0, 999, 1000, 1023, 1024, 10 << 10, 1023 << 10, 5 << 40]
            .map(|count| short(count, 1024));
        assert_eq!(
            bytes,
            ["0", "999", "1.0K", "1.0K", "1.0K", "10K", "1.0M", "5.0T"]
        );
        assert_eq!(
            [1000, 999_499, 999_500].map(|count| short(count, 1000)),
            ["1.0K", "999K", "1.0M"]
        );
        for bits in 0..64 {
            assert!(short(u64::MAX >> bits, 1024).len() <= 4);
        }
    }
}
