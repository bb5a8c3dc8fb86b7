use super::*;
use std::net::{Ipv4Addr, Ipv6Addr};

/// A response to "www.Example.org" A with these records behind it.
fn response(count: u16, records: &[&[u8]]) -> Vec<u8> {
    let mut message = vec![0xab, 0xcd, 0x81, 0x80, 0, 1, 0, 0, 0, 0, 0, 0];
    message[6..8].copy_from_slice(&count.to_be_bytes());
    message.extend_from_slice(b"\x03www\x07Example\x03org\0\0\x01\0\x01");
    assert_eq!(message.len(), RECORDS_AT);
    message.extend(records.concat());
    message
}

/// Where the first record of [`response`] stands.
const RECORDS_AT: usize = 33;

fn record(name: &[u8], kind: u16, ttl: u32, data: &[u8]) -> Vec<u8> {
    let mut record = name.to_vec();
    record.extend_from_slice(&kind.to_be_bytes());
    record.extend_from_slice(&CLASS_IN.to_be_bytes());
    record.extend_from_slice(&ttl.to_be_bytes());
    record.extend_from_slice(&(data.len() as u16).to_be_bytes());
    record.extend_from_slice(data);
    record
}

/// The first record's name as text.
fn first_name(message: &[u8]) -> Result<String, Malformed> {
    let answer = answers(message).unwrap().next().unwrap()?;
    Ok(answer.name.to_string())
}

#[test]
fn an_alias_and_its_addresses() {
    // www.example.org CNAME cdn.example.org (its last labels compressed); that has A and AAAA.
    let alias = record(&[0xc0, 12], 5, 300, b"\x03cdn\xc0\x10");
    let target = (RECORDS_AT + alias.len() - 6) as u8;
    let v6 = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 7);
    let message = response(
        4,
        &[
            &alias,
            &record(&[0xc0, target], 1, 60, &[192, 0, 2, 7]),
            &record(&[0xc0, target], 28, u32::MAX, &v6.octets()),
            &record(b"\x03CDN\x07example\xc0\x18", 16, 0, b"\x02hi"),
            // Not of the answer section.
            &record(&[0xc0, 12], 1, 9, &[6, 6, 6, 6]),
        ],
    );
    let (www, cdn) = ("www.example.org", "cdn.example.org");
    assert_eq!(question_name(&message).unwrap().to_string(), www);
    let got: Vec<_> = answers(&message).unwrap().map(Result::unwrap).collect();
    let AnswerData::Alias(to) = got[0].data else {
        panic!("{:?}", got[0])
    };
    assert_eq!(got[0].name.to_string(), www);
    assert_eq!((to.to_string().as_str(), got[0].ttl_secs), (cdn, 300));
    assert_eq!(got[0].name, question_name(&message).unwrap());
    assert_eq!(got[1].name, to);
    assert_eq!(got[3].name, to, "however it is written");
    assert_eq!(got[1].data, AnswerData::V4(Ipv4Addr::new(192, 0, 2, 7)));
    assert_eq!(got[1].ttl_secs, 60);
    assert_eq!(got[2].data, AnswerData::V6(v6));
    assert_eq!(got[2].ttl_secs, 0, "RFC 2181 8");
    let data = b"\x02hi";
    assert_eq!(got[3].data, AnswerData::Other { kind: 16, data });
    assert_eq!(got.len(), 4);
}

#[test]
fn names_are_shown_without_ambiguity() {
    let shown = |name: &[u8]| first_name(&response(1, &[&record(name, 16, 0, b"")])).unwrap();
    assert_eq!(shown(&[0]), ".");
    assert_eq!(shown(b"\x04A-_z\x02EU\0"), "a-_z.eu");
    assert_eq!(shown(b"\x03a.b\x01c\0"), "a\\.b.c");
    assert_eq!(shown(b"\x03a\\b\0"), "a\\\\b");
    assert_eq!(shown(b"\x05\0 \x7f\xc9\xff\0"), "\\000\\032\\127\\201\\255");
    let message = response(1, &[&record(b"\x02Vm\x01x\0", 16, 0, b"")]);
    let name = answers(&message).unwrap().next().unwrap().unwrap().name;
    assert_eq!(name.labels().collect::<Vec<_>>(), [&b"vm"[..], b"x"]);
    assert_eq!(name.wire(), b"\x02vm\x01x\0");
    let root = response(1, &[&record(&[0], 16, 0, b"")]);
    let root = answers(&root).unwrap().next().unwrap().unwrap().name;
    assert_eq!(root.labels().count(), 0);
}

#[test]
fn names_end() {
    let here = (0xc000 | RECORDS_AT as u16).to_be_bytes();
    let inside = (0xc000 | (RECORDS_AT as u16 + 1)).to_be_bytes();
    let beyond = (0xc000 | (RECORDS_AT as u16 + 50)).to_be_bytes();
    for (why, name) in [
        ("a pointer to itself", here.to_vec()),
        ("into its own labels", [b"\x01a", &here[..]].concat()),
        ("behind its start", [b"\x01\x01", &inside[..]].concat()),
        ("forwards", beyond.to_vec()),
        ("into the header", vec![0xc0, 11]),
        ("a reserved label", vec![0x40, 0]),
        ("another reserved label", vec![0x80, 0]),
    ] {
        let mut message = response(1, &[&record(&name, 1, 0, &[1, 2, 3, 4])]);
        message.resize(message.len() + 60, 0);
        assert_eq!(first_name(&message), Err(Malformed), "{why}");
    }
    // A chain of pointers, each to the one before: 127 are followed. The first leads to the root.
    for (jumps, ends) in [(1, true), (127, true), (128, false), (8_000, false)] {
        let mut data = vec![0];
        let data_at = RECORDS_AT + 11;
        for at in (data_at as u16..).step_by(2).take(jumps - 1) {
            let to = if data.len() == 1 { at } else { at - 1 };
            data.extend_from_slice(&(0xc000 | to).to_be_bytes());
        }
        let last = data_at + data.len() - if jumps == 1 { 1 } else { 2 };
        let name = (0xc000 | last as u16).to_be_bytes();
        let first = record(&[0], 16, 0, &data);
        let message = response(2, &[&first, &record(&name, 1, 0, &[1, 2, 3, 4])]);
        let second = answers(&message).unwrap().nth(1).unwrap();
        assert_eq!(second.is_ok(), ends, "{jumps}");
    }
    // 255 bytes are a name, 256 are none, pieced together or not.
    let label = |len: u8| [vec![len], vec![b'x'; usize::from(len)]].concat();
    let long = [label(63), label(63), label(63)].concat();
    for (last, fits) in [(61, true), (62, false)] {
        let whole = [&long[..], &label(last), &[0]].concat();
        let message = response(1, &[&record(&whole, 16, 0, b"")]);
        assert_eq!(first_name(&message).is_ok(), fits);
        let first = record(&[&label(last)[..], &[0]].concat(), 16, 0, b"");
        let pieced = [&long[..], &(0xc000 | RECORDS_AT as u16).to_be_bytes()].concat();
        let message = response(2, &[&first, &record(&pieced, 16, 0, b"")]);
        let second = answers(&message).unwrap().nth(1).unwrap();
        assert_eq!(second.is_ok(), fits);
    }
}

#[test]
fn what_is_no_answer_section_is_refused() {
    let good = response(1, &[&record(&[0xc0, 12], 1, 60, &[192, 0, 2, 7])]);
    let with = |at: usize, value: u8| {
        let mut bad = good.clone();
        bad[at] = value;
        bad
    };
    assert!(answers(&with(2, 1)).is_none(), "a query");
    assert!(answers(&with(5, 0)).is_none(), "without a question");
    assert!(answers(&with(5, 2)).is_none(), "with two questions");
    assert!(answers(&with(12, 0xc0)).is_none(), "a compressed question");
    assert!(question_name(&with(5, 0)).is_none());
    assert!(question_name(&with(5, 2)).is_none());
    assert!(question_name(&good[..RECORDS_AT - 1]).is_none());
    for len in 0..RECORDS_AT {
        assert!(answers(&good[..len]).is_none(), "{len}");
    }
    for len in RECORDS_AT..good.len() {
        let cut: Vec<_> = answers(&good[..len]).unwrap().collect();
        assert_eq!(cut, [Err(Malformed)], "{len}");
    }
    // More records announced than there are: the error comes once and is the last.
    let announced = with(7, 200);
    let many: Vec<_> = answers(&announced).unwrap().collect();
    assert!(many.len() == 2 && many[0].is_ok() && many[1].is_err());
    for (why, kind, data) in [
        ("A of 3 bytes", 1, &[1, 2, 3][..]),
        ("A of 5 bytes", 1, &[1, 2, 3, 4, 5]),
        ("AAAA of 4 bytes", 28, &[1, 2, 3, 4]),
        ("CNAME of none", 5, &[]),
        ("CNAME with more behind", 5, &[0xc0, 12, 0]),
        ("CNAME past its end", 5, &[3, b'a']),
    ] {
        let message = response(1, &[&record(&[0xc0, 12], kind, 60, data)]);
        let got: Vec<_> = answers(&message).unwrap().collect();
        assert_eq!(got, [Err(Malformed)], "{why}");
    }
    // Of another class it is data like any.
    let mut chaos = good.clone();
    chaos[RECORDS_AT + 5] = 3;
    let got = answers(&chaos).unwrap().next().unwrap().unwrap();
    assert!(matches!(got.data, AnswerData::Other { kind: 1, data } if data == [192, 0, 2, 7]));
}

/// splitmix64.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) % bound as u64) as usize
    }
}

#[test]
fn mutated_responses_are_read_within_bounds() {
    let alias = record(&[0xc0, 12], 5, 300, b"\x03cdn\xc0\x10");
    let seed = response(
        12,
        &[&alias, &record(&[0xc0, 45], 1, 60, &[192, 0, 2, 7]), &{
            record(&[0xc0, 12], 28, 60, &[1; 16]).repeat(10)
        }],
    );
    let mut random = Random(53);
    let (mut good, mut bad) = (0, 0);
    for _ in 0..100_000 {
        let mut message = seed.clone();
        for _ in 0..random.below(6) {
            let at = random.below(message.len());
            message[at] = match random.below(3) {
                0 => [0, 1, 12, 0x3f, 0x40, 0xc0, 0xff][random.below(7)],
                1 => message[at] ^ (1 << random.below(8)),
                _ => random.below(256) as u8,
            };
        }
        if random.below(4) == 0 {
            message.truncate(random.below(message.len()));
        }
        if let Some(name) = question_name(&message) {
            assert!(name.wire().len() <= NAME_LEN_MAX && name.wire().ends_with(&[0]));
            assert_eq!(name.to_string(), name.to_string().to_ascii_lowercase());
        }
        let Some(answers) = answers(&message) else {
            bad += 1;
            continue;
        };
        let mut ended = false;
        for answer in answers {
            assert!(!ended, "nothing comes behind an error");
            match answer {
                Ok(answer) => {
                    let of = answer.name.wire();
                    let labels: usize = answer.name.labels().map(|label| label.len() + 1).sum();
                    assert_eq!(labels + 1, of.len());
                    good += 1;
                }
                Err(Malformed) => (ended, bad) = (true, bad + 1),
            }
        }
    }
    assert!(good > 100_000 && bad > 10_000, "{good} {bad}");
}

#[test]
fn the_costliest_message_is_read_quickly() {
    // 64 KiB of records whose names are as long and as often compressed as may be.
    let label = [&[1][..], b"x"].concat();
    let mut data = Vec::new();
    let data_at = RECORDS_AT + 11;
    for n in 0..126 {
        let to = if n == 0 {
            None
        } else {
            Some(data_at + (n - 1) * 4)
        };
        data.extend_from_slice(&label);
        match to {
            Some(to) => data.extend_from_slice(&(0xc000 | to as u16).to_be_bytes()),
            None => data.extend_from_slice(&[0, 0]),
        }
    }
    let last = ((0xc000 | (data_at + 125 * 4)) as u16).to_be_bytes();
    let first = record(&[0], 16, 0, &data);
    let more = record(&last, 5, 0, &last);
    let count = (65_535 - RECORDS_AT - first.len()) / more.len();
    let message = response(count as u16 + 1, &[&first, &more.repeat(count)]);
    let started = std::time::Instant::now();
    let names = answers(&message).unwrap().filter(|answer| {
        let answer = answer.as_ref().unwrap();
        answer.name.wire().len() == 253 && matches!(answer.data, AnswerData::Alias(_))
    });
    assert_eq!(names.count(), count);
    let took = started.elapsed();
    assert!(took.as_millis() < 2_000, "{took:?} for {count} records");
}

#[test]
fn servers_are_asked_for_what_fits_every_path() {
    let query = |payload: u16, additional: u8, more: &[u8]| {
        let mut bytes = vec![0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, additional];
        bytes.extend_from_slice(&[1, b'x', 0, 0, 1, 0, 1]);
        bytes.extend_from_slice(&[0, 0, 41]);
        bytes.extend_from_slice(&payload.to_be_bytes());
        bytes.extend_from_slice(&[0, 0, 0, 0, 0, 0]);
        bytes.extend_from_slice(more);
        bytes
    };
    let limited = |mut bytes: Vec<u8>| {
        limit_payload(&mut bytes);
        bytes
    };
    assert_eq!(limited(query(4096, 1, &[])), query(1232, 1, &[]));
    assert_eq!(limited(query(65_535, 1, &[])), query(1232, 1, &[]));
    for small in [512, 1232] {
        assert_eq!(limited(query(small, 1, &[])), query(small, 1, &[]));
    }
    // A signature covers it; no OPT at all, and what is no query.
    let signed = query(4096, 2, &[0, 0, 250, 0, 255, 0, 0, 0, 0, 0, 0]);
    assert_eq!(limited(signed.clone()), signed);
    for bytes in [query(4096, 0, &[])[..19].to_vec(), vec![0; 12], Vec::new()] {
        assert_eq!(limited(bytes.clone()), bytes);
    }
}
