//! The results on a terminal.

use super::case::{Metric, Section};
use super::results::{Cell, Results};

/// A figure with three significant digits.
pub(super) fn figure(value: f64) -> String {
    match value.abs() {
        ..0.01 => format!("{value:.4}"),
        ..10.0 => format!("{value:.2}"),
        ..100.0 => format!("{value:.1}"),
        _ => thousands(value),
    }
}

/// Whole, with commas.
fn thousands(value: f64) -> String {
    let digits = format!("{:.0}", value.abs());
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    match value < 0.0 {
        true => format!("-{text}"),
        false => text,
    }
}

/// A row's name.
pub(super) fn label(title: &str, metric: &Metric) -> String {
    match metric.name {
        "" => title.to_owned(),
        name => format!("{title}, {name}"),
    }
}

/// What stands in a cell.
pub(super) fn cell(cell: &Cell) -> String {
    match cell {
        Cell::Figure(summary) if summary.count == 1 => figure(summary.median),
        Cell::Figure(summary) => {
            let spread = summary.spread_percent();
            format!("{} ±{spread:.0}%", figure(summary.median))
        }
        Cell::Reason(_) => "failed".to_owned(),
        Cell::NotReached => "-".to_owned(),
    }
}

/// All tables, and what is not in them.
pub(super) fn render(results: &Results) -> String {
    let mut text = String::new();
    for section in Section::ALL {
        let rows = results.rows(section);
        let ways = results.ways(section);
        if rows.is_empty() || ways.is_empty() {
            continue;
        }
        let head = ["", "unit"].map(str::to_owned).into_iter();
        let titles = ways.iter().map(|way| way.title(section).to_owned());
        let mut lines = vec![head.chain(titles).collect::<Vec<_>>()];
        for row in &rows {
            let mut line = vec![
                label(row.case.title, &row.metric),
                row.metric.unit.to_owned(),
            ];
            line.extend(row.cells.iter().map(cell));
            lines.push(line);
        }
        lines[0][0] = section.name().to_uppercase();
        text.push_str(&aligned(&lines));
        text.push('\n');
    }
    let facts: Vec<_> = results
        .about
        .iter()
        .map(|(_, value)| value.as_str())
        .collect();
    text.push_str(&format!("{} {}\n", results.method(), facts.join("; ")));
    let reasons = results.reasons();
    if !reasons.is_empty() {
        text.push_str("\nNot measured:\n");
        for reason in reasons {
            text.push_str(&format!("  {reason}\n"));
        }
    }
    text
}

/// Columns, the first two to the left, the others to the right.
fn aligned(lines: &[Vec<String>]) -> String {
    let columns = lines.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = lines.iter().filter_map(|line| line.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<_> = (0..columns).map(width).collect();
    let mut text = String::new();
    for line in lines {
        let cells: Vec<_> = line
            .iter()
            .enumerate()
            .map(|(column, cell)| match (column, widths[column]) {
                (0 | 1, width) => format!("{cell:<width$}"),
                (_, width) => format!("{cell:>width$}"),
            })
            .collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::results::example;
    use super::*;

    #[test]
    fn three_digits_are_enough() {
        let shown = [0.001_23, 0.5, 9.876, 12.34, 123.4, 25_000.0, 1_234_567.0].map(figure);
        assert_eq!(
            shown,
            [
                "0.0012",
                "0.50",
                "9.88",
                "12.3",
                "123",
                "25,000",
                "1,234,567"
            ]
        );
    }

    #[test]
    fn every_row_and_reason_is_there() {
        let text = render(&example());
        let lines: Vec<_> = text.lines().collect();
        let head: Vec<_> = lines[0].split_whitespace().collect();
        let expected = [
            "GUEST", "TO", "OUTSIDE", "unit", "lanlet", "kernel", "NAT", "pasta",
        ];
        assert_eq!(head, expected);
        let tcp: Vec<_> = lines[1].split_whitespace().collect();
        let expected = [
            "TCP,", "1", "stream", "Gbit/s", "10.0", "±10%", "12.5", "failed",
        ];
        assert_eq!(tcp, expected);
        assert_eq!(lines[0].chars().count(), lines[1].chars().count());
        assert!(text.contains("TCP request/response, p99.9"));
        assert!(text.contains("\n  pasta, guest to guest: it serves <one> guest\n"));
        assert!(!text.contains("GUEST TO GUEST"));
    }
}
