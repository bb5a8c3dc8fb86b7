//! `lanlet bench` for real, as an unprivileged user: every case gives a figure or a reason, the reports
//! can be read, and nothing outlives it.

mod common;

use std::collections::BTreeSet;

use common::{World, guests_missing, heavy, skip, world_missing};

/// Cases of a quick bench in each section: the round trips and connections have no way back.
const CASES: [(&str, usize); 5] = [
    ("guest-to-guest", 13),
    ("guest-to-outside", 12),
    ("outside-to-guest", 7),
    ("outside-to-published", 4),
    ("published-to-outside", 2),
];

#[test]
fn every_case_gives_a_figure_or_a_reason() {
    if let Some(reason) = world_missing() {
        return skip(&reason);
    }
    let world = World::new();
    let outcome = world.run(
        "step bench lanlet bench --quick --secs 0.05 --sections \
         guest-to-guest,guest-to-outside,outside-to-guest,outside-to-published,published-to-outside --only lanlet,kernel,pasta \
         --json \"$TMP/report.json\" --html \"$TMP/report.html\"",
    );
    let outcome = outcome.passed();
    let report = world.temp().read("report.json");
    let report: serde_json::Value = serde_json::from_str(&report).expect("JSON");
    let results = report["results"].as_array().expect("results");
    for (section, cases) in CASES {
        for path in ["lanlet", "kernel", "pasta"] {
            let is_ours = |of: &serde_json::Value| {
                of["path"] == path && (of["section"] == section || of["section"].is_null())
            };
            let found: Vec<_> = results.iter().filter(|result| is_ours(result)).collect();
            let names: BTreeSet<_> = found
                .iter()
                .map(|result| &result["case"])
                .map(text)
                .collect();
            let unmeasured = report["unmeasured"].as_array().expect("reasons");
            let reason = unmeasured.iter().find(|reason| is_ours(reason));
            match reason {
                Some(reason) => assert!(!text(&reason["reason"]).is_empty()),
                None => assert_eq!(names.len(), cases, "{path}, {section}: {names:?}"),
            }
            for result in found {
                let median = result["median"].as_f64();
                let failures = result["failures"].as_array().expect("failures");
                // Processor time has ticks of 10 ms, and runs here are hardly longer.
                let is_told = median.is_some_and(|median| median > 0.0)
                    || result["metric"] == "CPU"
                    || !failures.is_empty();
                assert!(is_told, "{result}\n{}", outcome.text());
            }
        }
    }
    // lanlet has no excuse.
    let of_lanlet = results.iter().filter(|result| result["path"] == "lanlet");
    for result in of_lanlet {
        assert!(result["median"].is_f64(), "{result}\n{}", outcome.text());
    }
    let page = world.temp().read("report.html");
    assert!(page.matches("<svg class=\"bars\"").count() >= 20, "{page}");
    assert_eq!(page.matches("<svg class=\"curves\"").count(), 4);
    assert!(outcome.stdout.contains("GUEST TO OUTSIDE"));
}

fn text(value: &serde_json::Value) -> String {
    value.as_str().expect("a text").to_owned()
}

/// A VM boots on each path that has one, and its figures come over the serial line.
#[test]
fn vms_are_measured() {
    if let Some(reason) = guests_missing() {
        return skip(&reason);
    }
    let _alone = heavy();
    let outcome = World::new().run(
        "step bench lanlet bench --quick --sections vm-to-outside --cases tcp-1,rtt \
         --only lanlet,kernel,pasta,qemu --guest-image \"$LAB/out\"",
    );
    let outcome = outcome.passed();
    assert!(!outcome.stdout.contains("failed"), "{}", outcome.text());
    let mut lines = outcome.stdout.lines();
    let head = lines.find(|line| line.starts_with("VM TO OUTSIDE"));
    let head: Vec<_> = head.expect("a table").split("  ").map(str::trim).collect();
    for path in ["lanlet", "kernel NAT", "passt", "QEMU user"] {
        assert!(head.contains(&path), "{path}: {}", outcome.text());
    }
}

/// Two VMs on each path, one of them by shared memory.
#[test]
fn vms_are_measured_between_each_other() {
    if let Some(reason) = guests_missing() {
        return skip(&reason);
    }
    let _alone = heavy();
    let world = World::new();
    let outcome = world
        .run(
            "step bench lanlet bench --quick --sections vm-to-vm --cases tcp-1 \
             --only lanlet-vhost-user,kernel --guest-image \"$LAB/out\" --json \"$TMP/vms.json\"",
        )
        .passed();
    let report = world.temp().read("vms.json");
    let report: serde_json::Value = serde_json::from_str(&report).expect("JSON");
    let results = report["results"].as_array().expect("results");
    assert_eq!(results.len(), 2, "{}", outcome.text());
    for result in results {
        assert!(result["median"].as_f64() > Some(0.0), "{result}");
    }
}

/// What the card promises: MiB resident at rest, KiB per idle flow.
const REST_MIB_MAX: f64 = 20.0;
const FLOW_KIB_MAX: f64 = 10.0;
/// Percent of a core that an idle network may take.
const REST_CPU_MAX: f64 = 0.5;
/// What may stay after a burst, MiB: heap, stacks and pages of the program first used in it.
const AFTER_BURST_MIB_MAX: f64 = 3.0;

#[test]
fn what_a_network_takes_is_within_bounds() {
    if let Some(reason) = world_missing() {
        return skip(&reason);
    }
    let world = World::new();
    let outcome = world
        .run("step bench lanlet bench --quick --sections costs --json \"$TMP/costs.json\"")
        .passed();
    let report = world.temp().read("costs.json");
    let report: serde_json::Value = serde_json::from_str(&report).expect("JSON");
    let figure = |case: &str, metric: &str| {
        let mut results = report["results"].as_array().expect("results").iter();
        let found = results.find(|result| result["case"] == case && result["metric"] == metric);
        let median = found.and_then(|result| result["median"].as_f64());
        median.unwrap_or_else(|| panic!("no {case}, {metric}:\n{}", outcome.text()))
    };
    let rest = figure("rest", "resident") + figure("rest", "helper, private");
    assert!(rest <= REST_MIB_MAX, "{}", outcome.text());
    let cpu = figure("rest", "CPU of one core");
    assert!(cpu <= REST_CPU_MAX, "{}", outcome.text());
    assert!(figure("per-flow", "") <= FLOW_KIB_MAX, "{}", outcome.text());
    for case in ["per-port", "per-lease", "per-mapping"] {
        assert!(figure(case, "") > 0.0, "{case}: {}", outcome.text());
    }
    let kept = figure("burst", "after") - figure("burst", "before");
    assert!(kept <= AFTER_BURST_MIB_MAX, "{}", outcome.text());
}

/// Ended by a signal it shows what it has, ended by SIGKILL nothing: no process is left either way.
#[test]
fn nothing_outlives_it() {
    if let Some(reason) = world_missing() {
        return skip(&reason);
    }
    let outcome = World::new()
        .run(
            r#"
            for signal in TERM KILL; do
                # Not by as-user, whose shell takes the signal for itself.
                unshare --user --map-user=1000 --map-group=1000 -- \
                    "$LANLET" bench --only lanlet,kernel --cases tcp-1,rtt --secs 0.2 >$signal.out 2>$signal.err &
                pid=$!
                wait_for $signal.err 'round 1/5, guest to guest, rtt'
                pgrep -f bench-peer >/dev/null && say running=yes
                kill -$signal $pid
                wait $pid
                say $signal=$?
                for _ in $(seq 100); do
                    pgrep -f 'bench-peer|lanlet' >/dev/null || break
                    sleep 0.02
                done
                say left=$(pgrep -fc 'bench-peer|lanlet up|lanlet exec')
            done
            grep -q '^TCP, 1 stream' TERM.out && say shown=yes
            true
            "#,
        )
        .passed();
    let markers = outcome.markers();
    assert_eq!(markers.get("TERM"), Some("143"), "{}", outcome.text());
    assert_eq!(markers.get("KILL"), Some("137"), "{}", outcome.text());
    assert_eq!(markers.all("running"), ["yes"; 2], "{}", outcome.text());
    assert_eq!(markers.all("left"), ["0"; 2], "{}", outcome.text());
    assert_eq!(markers.get("shown"), Some("yes"), "{}", outcome.text());
}

#[test]
fn what_is_missing_is_said() {
    if let Some(reason) = world_missing() {
        return skip(&reason);
    }
    let outcome = World::new()
        .run(
            r#"
            for tool in pasta nft; do
                : >none; mount --bind none "$(command -v $tool)"
            done
            lanlet bench --quick --only kernel,pasta --cases tcp-1 >missing.out 2>missing.err
            say missing=$?
            grep -q '^  pasta: ' missing.out && say pasta=told
            grep -q '^  kernel, guest to outside: ' missing.out && say nft=told
            grep -q 'kernel bridge' missing.out && say bridge=shown
            lanlet bench --only base 2>usage.err; say usage=$?
            lanlet bench --json /nonexistent/x 2>file.err; say file=$?
            grep -q -- '--base' usage.err && say base=yes
            true
            "#,
        )
        .passed();
    let markers = outcome.markers();
    assert_eq!(markers.get("missing"), Some("0"), "{}", outcome.text());
    for (key, value) in [("pasta", "told"), ("nft", "told"), ("bridge", "shown")] {
        assert_eq!(markers.get(key), Some(value), "{key}: {}", outcome.text());
    }
    assert_eq!(markers.get("usage"), Some("2"), "{}", outcome.text());
    assert_eq!(markers.get("file"), Some("1"), "{}", outcome.text());
    assert_eq!(markers.get("base"), Some("yes"), "{}", outcome.text());
}
