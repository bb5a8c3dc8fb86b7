//! What was measured, and what was not and why.

use std::collections::BTreeMap;

use serde::Serialize;

use super::case::{Case, Metric, Section};
use super::control::{Event, Plan, Run};
use super::statistics::Summary;
use super::way::Way;

/// All figures of a bench.
pub(super) struct Results {
    pub(super) plan: Plan,
    /// Date, machine and versions.
    pub(super) about: Vec<(String, String)>,
    /// Each run's figures of every round, and what failed.
    runs: BTreeMap<Run, (Vec<Vec<f64>>, Vec<String>)>,
    unmeasured: Vec<(Way, Option<Section>, String)>,
    /// Whether it was ended before its time.
    pub(super) is_cut_short: bool,
}

/// What a report has at one place.
#[derive(Clone, PartialEq, Debug)]
pub(super) enum Cell {
    Figure(Summary),
    /// Why there is none.
    Reason(String),
    /// The bench was ended before.
    NotReached,
}

/// A figure of all ways.
pub(super) struct Row {
    pub(super) case: Case,
    pub(super) metric: Metric,
    /// In the order of [`Results::ways`].
    pub(super) cells: Vec<Cell>,
}

impl Results {
    pub(super) fn new(plan: Plan, about: Vec<(String, String)>) -> Self {
        Self {
            plan,
            about,
            runs: BTreeMap::new(),
            unmeasured: Vec::new(),
            is_cut_short: false,
        }
    }

    pub(super) fn take(&mut self, event: Event) {
        match event {
            Event::Unmeasured {
                way,
                section,
                reason,
            } => self.unmeasured.push((way, section, reason)),
            Event::Ended { run, outcome } => {
                let (samples, failures) = self.runs.entry(run).or_default();
                match outcome {
                    Ok(values) => samples.push(values),
                    Err(reason) => failures.push(reason),
                }
            }
            Event::Ready { .. } | Event::Begun { .. } => {}
        }
    }

    /// The ways with a figure in this section, in order.
    pub(super) fn ways(&self, section: Section) -> Vec<Way> {
        let has_run = |way: &Way| {
            let mut runs = self.runs.iter();
            runs.any(|(run, _)| run.section == section && run.way == *way)
        };
        self.plan.ways.iter().copied().filter(has_run).collect()
    }

    /// The figures of a section.
    pub(super) fn rows(&self, section: Section) -> Vec<Row> {
        let ways = self.ways(section);
        let mut rows = Vec::new();
        for case in self.plan.cases() {
            for (index, &metric) in case.load.metrics().iter().enumerate() {
                if case.load.goes(section) {
                    let cell = |&way| self.cell(section, case, index, way);
                    rows.push(Row {
                        case,
                        metric,
                        cells: ways.iter().map(cell).collect(),
                    });
                }
            }
        }
        rows
    }

    /// A run's figures of one metric, of all rounds.
    fn samples(&self, run: &Run, index: usize) -> Vec<f64> {
        let values = self.runs.get(run).map_or(&[][..], |(values, _)| values);
        let values = values.iter();
        values
            .filter_map(|values| values.get(index).copied())
            .collect()
    }

    fn cell(&self, section: Section, case: Case, index: usize, way: Way) -> Cell {
        let run = Run {
            section,
            case: case.name.to_owned(),
            way,
        };
        match Summary::of(&self.samples(&run, index)) {
            Some(summary) => Cell::Figure(summary),
            None => {
                let failures = self
                    .runs
                    .get(&run)
                    .map_or(&[][..], |(_, failures)| failures);
                failures
                    .last()
                    .cloned()
                    .map_or(Cell::NotReached, Cell::Reason)
            }
        }
    }

    /// How it was measured, as a sentence.
    pub(super) fn method(&self) -> String {
        let Plan { rounds, secs, .. } = self.plan;
        let end = if self.is_cut_short {
            ", as far as it came"
        } else {
            ""
        };
        match rounds {
            1 => format!("One run of {secs} s each{end}."),
            _ => format!(
                "Medians of {rounds} interleaved runs of {secs} s{end}; ± is half of the range."
            ),
        }
    }

    /// What has no figure at all, or lost some rounds, in words.
    pub(super) fn reasons(&self) -> Vec<String> {
        // Ways that share a reason share a line.
        let mut ways: Vec<(String, Vec<String>)> = Vec::new();
        for (way, section, reason) in &self.unmeasured {
            let place = section.map_or_else(String::new, |d| format!(", {}", d.name()));
            let rest = format!("{place}: {reason}");
            match ways.iter_mut().find(|(other, _)| *other == rest) {
                Some((_, names)) => names.push(way.name()),
                None => ways.push((rest, vec![way.name()])),
            }
        }
        let lines = ways.iter();
        let mut reasons: Vec<_> = lines
            .map(|(rest, names)| format!("{}{rest}", names.join(", ")))
            .collect();
        for (run, (samples, failures)) in &self.runs {
            if let Some(last) = failures.last() {
                reasons.push(format!(
                    "{}, {}, {}: {} of {} runs failed: {last}",
                    run.way.name(),
                    run.section.name(),
                    run.case,
                    failures.len(),
                    failures.len() + samples.len()
                ));
            }
        }
        reasons
    }

    /// Whether this program itself has a figure in every row of what was begun.
    pub(super) fn lanlet_is_whole(&self) -> bool {
        let is_broken = |(way, section, _): &(Way, Option<Section>, String)| {
            *way == Way::Lanlet && section.is_none()
        };
        let mut runs = self.runs.iter();
        !self.unmeasured.iter().any(is_broken)
            && runs.all(|(run, (samples, _))| run.way != Way::Lanlet || !samples.is_empty())
    }

    /// The results as JSON: everything, by run.
    pub(super) fn to_json(&self) -> serde_json::Result<String> {
        let mut results = Vec::new();
        for (run, (_, failures)) in &self.runs {
            let Some(case) = self.plan.cases().into_iter().find(|c| c.name == run.case) else {
                continue;
            };
            for (index, metric) in case.load.metrics().iter().enumerate() {
                let samples = self.samples(run, index);
                let summary = Summary::of(&samples);
                results.push(JsonResult {
                    path: run.way.name(),
                    mtu: run.way.mtu(),
                    section: run.section,
                    case: case.name,
                    metric: metric.name,
                    unit: metric.unit,
                    more_is_better: metric.more_is_better,
                    median: summary.map(|s| s.median),
                    min: summary.map(|s| s.min),
                    max: summary.map(|s| s.max),
                    samples,
                    failures,
                });
            }
        }
        let unmeasured = self.unmeasured.iter();
        serde_json::to_string_pretty(&Json {
            about: self.about.iter().cloned().collect(),
            rounds: self.plan.rounds,
            secs: self.plan.secs,
            results,
            unmeasured: unmeasured
                .map(|(way, section, reason)| JsonUnmeasured {
                    path: way.name(),
                    section: *section,
                    reason,
                })
                .collect(),
        })
    }
}

/// The form of `--json`.
#[derive(Serialize)]
struct Json<'a> {
    about: BTreeMap<String, String>,
    rounds: u32,
    secs: f64,
    results: Vec<JsonResult<'a>>,
    unmeasured: Vec<JsonUnmeasured<'a>>,
}

#[derive(Serialize)]
struct JsonResult<'a> {
    path: String,
    mtu: u32,
    section: Section,
    case: &'a str,
    metric: &'a str,
    unit: &'a str,
    more_is_better: bool,
    /// `null`, as the two below, where all runs failed.
    median: Option<f64>,
    min: Option<f64>,
    max: Option<f64>,
    samples: Vec<f64>,
    failures: &'a [String],
}

#[derive(Serialize)]
struct JsonUnmeasured<'a> {
    path: String,
    section: Option<Section>,
    reason: &'a str,
}

/// Results for the tests of the reports.
#[cfg(test)]
pub(super) fn example() -> Results {
    let plan = Plan {
        ways: vec![Way::Lanlet, Way::Kernel, Way::Pasta],
        cases: ["tcp-1", "rtt", "flows-10", "flows-1k"]
            .map(str::to_owned)
            .to_vec(),
        sections: Section::ALL.to_vec(),
        rounds: 2,
        secs: 1.0,
        base: None,
        workers: None,
        guest_image: None,
    };
    let about = vec![("date".to_owned(), "2026-01-02".to_owned())];
    let mut results = Results::new(plan, about);
    results.take(Event::Unmeasured {
        way: Way::Pasta,
        section: Some(Section::GuestToGuest),
        reason: "it serves <one> guest".to_owned(),
    });
    let outcomes = [
        (Way::Lanlet, "tcp-1", Ok(vec![9.0])),
        (Way::Lanlet, "tcp-1", Ok(vec![11.0])),
        (Way::Kernel, "tcp-1", Ok(vec![12.5])),
        (Way::Pasta, "tcp-1", Err("no result within 7 s".to_owned())),
        (Way::Lanlet, "rtt", Ok(vec![60.0, 90.0, 200.0])),
        (Way::Lanlet, "flows-10", Ok(vec![61.0, 100.0])),
        (Way::Lanlet, "flows-1k", Ok(vec![65.0, 110.0])),
        (Way::Kernel, "flows-10", Ok(vec![51.0, 80.0])),
        (Way::Kernel, "flows-1k", Ok(vec![55.0, 90.0])),
    ];
    for (way, case, outcome) in outcomes {
        let run = Run {
            section: Section::GuestToOutside,
            case: case.to_owned(),
            way,
        };
        results.take(Event::Ended { run, outcome });
    }
    results
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_place_has_a_figure_or_a_reason() {
        let results = example();
        let ways = results.ways(Section::GuestToOutside);
        assert_eq!(ways, [Way::Lanlet, Way::Kernel, Way::Pasta]);
        assert!(results.ways(Section::GuestToGuest).is_empty());
        let rows = results.rows(Section::GuestToOutside);
        assert_eq!(rows.len(), 1 + 3 + 2 + 2);
        let Cell::Figure(summary) = rows[0].cells[0] else {
            panic!()
        };
        assert_eq!((summary.median, summary.min), (10.0, 9.0));
        assert_eq!(
            rows[0].cells[2],
            Cell::Reason("no result within 7 s".to_owned())
        );
        assert_eq!(rows[1].cells[1], Cell::NotReached);
        let reasons = results.reasons();
        assert_eq!(reasons[0], "pasta, guest to guest: it serves <one> guest");
        assert_eq!(
            reasons[1],
            "pasta, guest to outside, tcp-1: 1 of 1 runs failed: no result within 7 s"
        );
        assert!(results.lanlet_is_whole());
    }

    #[test]
    fn json_has_all_samples() {
        let json: serde_json::Value = serde_json::from_str(&example().to_json().unwrap()).unwrap();
        let results = json["results"].as_array().unwrap();
        let first = &results[0];
        let of_lanlet = results
            .iter()
            .find(|r| r["path"] == "lanlet" && r["case"] == "tcp-1")
            .unwrap();
        assert_eq!(of_lanlet["samples"], serde_json::json!([9.0, 11.0]));
        assert_eq!(of_lanlet["median"], 10.0);
        assert_eq!(first["section"], "guest-to-outside");
        assert_eq!(json["unmeasured"][0]["path"], "pasta");
        assert_eq!(json["about"]["date"], "2026-01-02");
    }
}
