//! The results as one HTML file that needs no other: plots, then every figure.

use std::fmt::Write;

use clap::ValueEnum;

use super::case::{Load, Section};
use super::plot::{Bar, Curve, bars, curves, escaped};
use super::results::{Cell, Results, Row};
use super::table::{cell, label};
use super::way::Way;

/// A colour per way, in its order: lanlet's own stand out, a peer's two MTUs are of one hue.
const COLORS: [&str; 12] = [
    "#d9480f", "#f59f00", "#f06595", "#862e9c", "#c2255c", "#1971c2", "#2f9e44", "#8ce99a",
    "#6741d9", "#b197fc", "#0c8599", "#868e96",
];

const STYLE: &str = "
:root { color-scheme: light dark; --ink: #212529; --soft: #6c757d; --line: #dee2e6; --page: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e9ecef; --soft: #adb5bd; --line: #373b3e; --page: #1a1d20; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
h3 { margin: 1.5rem 0 0.2rem; font-size: 1rem; } .soft { color: var(--soft); font-weight: normal; }
svg { display: block; width: 100%; max-width: 760px; height: auto; }
text { font: 12px system-ui, sans-serif; fill: var(--ink); }
.name { text-anchor: end; } .axis { text-anchor: middle; } .figure, .none { fill: var(--soft); }
.none { font-style: italic; } .range { stroke: var(--ink); stroke-width: 1.5; opacity: 0.6; }
.grid { stroke: var(--line); } polyline { fill: none; stroke-width: 2; }
table { border-collapse: collapse; font-size: 13px; } .wide { overflow-x: auto; }
th, td { padding: 0.2rem 0.6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } td { font-variant-numeric: tabular-nums; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; } dd { margin: 0; }
";

/// The page.
pub(super) fn render(results: &Results) -> String {
    let mut page = String::from(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width\">\n<title>lanlet bench</title>\n<style>",
    );
    page.push_str(STYLE);
    for (index, color) in COLORS.iter().enumerate() {
        let _ = writeln!(
            page,
            ".c{index}, .t{index} {{ fill: {color}; }} .l{index} {{ stroke: {color}; }}"
        );
    }
    page.push_str("</style>\n<h1>lanlet bench</h1>\n");
    let _ = writeln!(page, "<p>{}</p>", escaped(&results.method()));
    page.push_str("<dl>\n");
    for (what, value) in &results.about {
        let _ = writeln!(page, "<dt>{}<dd>{}", escaped(what), escaped(value));
    }
    page.push_str("</dl>\n");
    for section in Section::ALL {
        write_section(&mut page, results, section);
    }
    let reasons = results.reasons();
    if !reasons.is_empty() {
        page.push_str("<h2>Not measured</h2>\n<ul>\n");
        for reason in reasons {
            let _ = writeln!(page, "<li>{}", escaped(&reason));
        }
        page.push_str("</ul>\n");
    }
    page
}

fn write_section(page: &mut String, results: &Results, section: Section) {
    let (rows, ways) = (results.rows(section), results.ways(section));
    if rows.is_empty() || ways.is_empty() {
        return;
    }
    let _ = writeln!(page, "<h2>{}</h2>", capital(section.name()));
    for row in rows.iter().filter(|row| flows(row).is_none()) {
        heading(page, &label(row.case.title, &row.metric), row);
        let each = ways.iter().zip(&row.cells).map(|(&way, cell)| Bar {
            name: way.title(section),
            color: color(way),
            value: match cell {
                Cell::Figure(summary) => Ok(*summary),
                Cell::Reason(reason) => Err(reason.as_str()),
                Cell::NotReached => Err("not reached"),
            },
        });
        page.push_str(&bars(&each.collect::<Vec<_>>(), row.metric.unit));
    }
    let mut names: Vec<_> = rows
        .iter()
        .filter(|row| flows(row).is_some())
        .map(|row| row.metric.name)
        .collect();
    names.sort_unstable();
    names.dedup();
    // Latency comes before what it costs.
    for name in names.into_iter().rev() {
        let of_name: Vec<_> = rows
            .iter()
            .filter(|row| row.metric.name == name && flows(row).is_some())
            .collect();
        let Some(first) = of_name.first() else {
            continue;
        };
        heading(
            page,
            &format!("TCP round trip by number of flows, {name}"),
            first,
        );
        let each = ways.iter().enumerate().map(|(index, &way)| Curve {
            name: way.title(section),
            color: color(way),
            points: of_name
                .iter()
                .filter_map(|row| match (flows(row), &row.cells[index]) {
                    (Some(flows), Cell::Figure(summary)) => Some((flows as f64, *summary)),
                    _ => None,
                })
                .collect(),
        });
        let each: Vec<_> = each.filter(|curve| !curve.points.is_empty()).collect();
        page.push_str(&curves(&each, first.metric.unit, "flows"));
    }
    figures(page, &rows, &ways, section);
}

/// All figures of a section, as a table.
fn figures(page: &mut String, rows: &[Row], ways: &[Way], section: Section) {
    page.push_str("<h3>All figures <span class=\"soft\">grey: lanlet's divided by this one</span></h3>\n<div class=\"wide\"><table>\n<tr><th><th>");
    for way in ways {
        let _ = write!(page, "<th>{}", escaped(way.title(section)));
    }
    page.push('\n');
    for row in rows {
        let (name, unit) = (label(row.case.title, &row.metric), row.metric.unit);
        let _ = write!(page, "<tr><td>{}<td>{unit}", escaped(&name));
        let ours = ways
            .iter()
            .zip(&row.cells)
            .find(|(way, _)| **way == Way::Lanlet);
        for (way, each) in ways.iter().zip(&row.cells) {
            let _ = write!(page, "<td>{}", escaped(&cell(each)));
            if let (Some((_, Cell::Figure(ours))), Cell::Figure(theirs)) = (ours, each)
                && *way != Way::Lanlet
                && theirs.median > 0.0
            {
                let ratio = ours.median / theirs.median;
                let _ = write!(page, " <span class=\"soft\">{ratio:.2}</span>");
            }
        }
        page.push('\n');
    }
    page.push_str("</table></div>\n");
}

fn heading(page: &mut String, title: &str, row: &Row) {
    let better = match row.metric.more_is_better {
        true => "more is better",
        false => "less is better",
    };
    let _ = writeln!(
        page,
        "<h3>{} <span class=\"soft\">{}, {better}</span></h3>",
        escaped(title),
        row.metric.unit
    );
}

/// The number of flows of a row that is a point of a curve.
fn flows(row: &Row) -> Option<usize> {
    match row.case.load {
        Load::RoundTrips { flows } if flows > 1 => Some(flows),
        _ => None,
    }
}

fn color(way: Way) -> usize {
    let mut ways = Way::value_variants().iter();
    ways.position(|other| *other == way).unwrap_or(0) % COLORS.len()
}

fn capital(text: &str) -> String {
    let mut letters = text.chars();
    let first = letters.next().map(|first| first.to_ascii_uppercase());
    first.into_iter().chain(letters).collect()
}

#[cfg(test)]
mod tests {
    use super::super::results::example;
    use super::*;

    #[test]
    fn the_page_has_plots_figures_and_reasons_and_refers_to_nothing() {
        let page = render(&example());
        // One of bars per figure, one of curves per figure of the flows.
        assert_eq!(page.matches("<svg class=\"bars\"").count(), 4);
        assert_eq!(page.matches("<svg class=\"curves\"").count(), 2);
        assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());
        assert!(page.contains("<td>10.0 ±10%"));
        assert!(page.contains("no result within 7 s"));
        assert!(page.contains("it serves &lt;one&gt; guest"));
        assert!(!page.contains("Guest to guest</h2>"));
        for reference in ["http", "src=", "href=", "url(", "@import"] {
            assert!(!page.contains(reference), "{reference}");
        }
    }

    #[test]
    fn every_way_has_a_colour_of_its_own() {
        assert_eq!(Way::value_variants().len(), COLORS.len());
    }
}
