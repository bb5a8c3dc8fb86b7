//! DNS messages as far as a forwarder reads them (RFC 1035 4, RFC 6891 6.1): the header, the one
//! question, and OPT; and the answer section for the egress policy.

mod answer;
mod name;

use std::ops::Range;

use crate::stats::DropReason;
use crate::wire::be16;

pub use answer::{Answer, AnswerData, Answers, Malformed, answers, question_name};
pub use name::Name;

/// Header (RFC 1035 4.1.1).
pub const HEADER_LEN: usize = 12;
/// The longest query that is passed on. A name has 255 bytes at most, OPT with a cookie and a
/// signature some hundreds; 1,232 is what fits every path (RFC 9715 3).
pub const QUERY_LEN_MAX: usize = 1_232;
/// Largest UDP message without EDNS (RFC 1035 4.2.1).
pub const PAYLOAD_MAX_PLAIN: u16 = 512;
/// Largest UDP message that servers are asked for (RFC 9715 3.2).
pub const UPSTREAM_PAYLOAD_MAX: u16 = 1_232;
/// Longest name on the wire (RFC 1035 2.3.4).
const NAME_LEN_MAX: usize = 255;
/// Longest label; larger values of its byte are pointers or reserved (RFC 1035 4.1.4).
const LABEL_LEN_MAX: u8 = 63;
/// OPT and one signature (TSIG, SIG(0)) may stand behind the question.
const ADDITIONAL_MAX: u16 = 2;
/// Record type OPT (RFC 6891 6.1.1).
const TYPE_OPT: u16 = 41;
/// Type, class, TTL and length of a record, behind its name.
const RECORD_FIXED_LEN: usize = 10;
/// Class Internet (RFC 1035 3.2.4).
const CLASS_IN: u16 = 1;
/// Zone transfers (RFC 5936, RFC 1995) are not for resolvers.
const TYPE_TRANSFERS: Range<u16> = 251..253;

/// Bits of the header's third and fourth byte (RFC 1035 4.1.1).
const FLAG_QR: u8 = 0x80;
const OPCODE_MASK: u8 = 0x78;
const FLAG_TC: u8 = 0x02;
const FLAG_RD: u8 = 0x01;
const FLAG_RA: u8 = 0x80;
const RCODE_MASK: u8 = 0x0f;

/// Response codes (RFC 1035 4.1.1).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Rcode {
    /// The query can't be understood.
    FormErr = 1,
    /// The resolver failed.
    ServFail = 2,
    /// An operation that is not offered.
    NotImp = 4,
    /// Not done by policy.
    Refused = 5,
}

/// Why a message is not passed on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum QueryError {
    /// No query: not answered (an answer to an answer could loop).
    Drop(DropReason),
    /// A query that is answered with an error.
    Answer(Rcode),
}

/// A query that may be passed on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Query {
    /// Where the question (name, type, class) ends; it starts behind the header.
    pub question_end: usize,
    /// The largest UDP message that the client takes: its EDNS size, at least 512 (RFC 6891 6.2.3).
    pub payload_max: u16,
}

impl Query {
    /// Checks a message from a guest, to its last byte.
    ///
    /// # Errors
    /// What to do with it instead of passing it on.
    pub fn parse(bytes: &[u8]) -> Result<Self, QueryError> {
        const FORM_ERR: QueryError = QueryError::Answer(Rcode::FormErr);
        if bytes.len() < HEADER_LEN {
            return Err(QueryError::Drop(DropReason::Truncated));
        }
        if bytes[2] & FLAG_QR != 0 {
            return Err(QueryError::Drop(DropReason::Malformed));
        }
        if bytes[2] & OPCODE_MASK != 0 {
            return Err(QueryError::Answer(Rcode::NotImp));
        }
        let additional = be16(bytes, 10);
        let counts = (be16(bytes, 4), be16(bytes, 6), be16(bytes, 8));
        if bytes.len() > QUERY_LEN_MAX || counts != (1, 0, 0) || additional > ADDITIONAL_MAX {
            return Err(FORM_ERR);
        }
        let end = question_end(bytes).ok_or(FORM_ERR)?;
        let (kind, class) = (be16(bytes, end - 4), be16(bytes, end - 2));
        if class != CLASS_IN || TYPE_TRANSFERS.contains(&kind) {
            return Err(QueryError::Answer(Rcode::Refused));
        }
        let mut payload_max = None;
        let mut at = end;
        for _ in 0..additional {
            let record = Record::parse(bytes, at).ok_or(FORM_ERR)?;
            if record.kind == TYPE_OPT {
                // RFC 6891 6.1.1: the root's, and at most one.
                if record.fixed_at != at + 1 || payload_max.is_some() {
                    return Err(FORM_ERR);
                }
                payload_max = Some(record.class.max(PAYLOAD_MAX_PLAIN));
            }
            at = record.end;
        }
        if at != bytes.len() {
            return Err(FORM_ERR);
        }
        Ok(Self {
            question_end: end,
            payload_max: payload_max.unwrap_or(PAYLOAD_MAX_PLAIN),
        })
    }
}

/// Lowers the size of UDP messages that a checked query takes to [`UPSTREAM_PAYLOAD_MAX`]: a longer
/// answer may come in fragments, which get lost and can be forged (RFC 9715 3.2). One that is signed stays
/// as it is.
pub fn limit_payload(query: &mut [u8]) {
    let Some(end) = question_end(query) else {
        return;
    };
    let Some(record) = Record::parse(query, end) else {
        return;
    };
    if record.kind == TYPE_OPT && record.end == query.len() && record.class > UPSTREAM_PAYLOAD_MAX {
        let class = record.fixed_at + 2;
        query[class..class + 2].copy_from_slice(&UPSTREAM_PAYLOAD_MAX.to_be_bytes());
    }
}

/// Whether the message is a response with a whole header.
pub fn is_response(bytes: &[u8]) -> bool {
    bytes.len() >= HEADER_LEN && bytes[2] & FLAG_QR != 0
}

/// Whether the sender of a response left out what did not fit (RFC 2181 9).
pub fn is_truncated(response: &[u8]) -> bool {
    response.get(2).is_some_and(|flags| flags & FLAG_TC != 0)
}

/// The response code of a response; `None` if it is too short to have one.
pub fn rcode(bytes: &[u8]) -> Option<u8> {
    bytes.get(3).map(|flags| flags & RCODE_MASK)
}

/// Whether the message is a whole, successful response to a standard query.
pub fn is_success(bytes: &[u8]) -> bool {
    is_response(bytes) && bytes[2] & (OPCODE_MASK | FLAG_TC) == 0 && bytes[3] & RCODE_MASK == 0
}

/// Whether `answer` answers `query`: a response with the same id and the same question, names
/// compared without regard to case (RFC 5452 9.1).
pub fn is_answer_to(answer: &[u8], query: &[u8]) -> bool {
    let Some(end) = question_end(query) else {
        return false;
    };
    is_response(answer)
        && answer[..2] == query[..2]
        && answer[2] & OPCODE_MASK == query[2] & OPCODE_MASK
        && be16(answer, 4) == 1
        && question_end(answer) == Some(end)
        && answer[HEADER_LEN..end].eq_ignore_ascii_case(&query[HEADER_LEN..end])
}

/// An error response to `query` with its question.
///
/// # Panics
/// If `query` is shorter than a header: it was parsed before.
pub fn failure(query: &[u8], code: Rcode) -> Vec<u8> {
    match question_end(query) {
        Some(end) if be16(query, 4) == 1 => {
            let mut answer = error_header(&query[..end], code);
            answer[5] = 1;
            answer
        }
        _ => header_only(query, code),
    }
}

/// An error response without sections, for a query whose question can't be trusted.
///
/// # Panics
/// If `query` is shorter than a header: it was parsed before.
pub fn header_only(query: &[u8], code: Rcode) -> Vec<u8> {
    error_header(&query[..HEADER_LEN], code)
}

/// `query` with its header made a response's, all counts 0.
fn error_header(query: &[u8], code: Rcode) -> Vec<u8> {
    let mut answer = query.to_vec();
    answer[2] = FLAG_QR | query[2] & (OPCODE_MASK | FLAG_RD);
    answer[3] = FLAG_RA | code as u8;
    answer[4..HEADER_LEN].fill(0);
    answer
}

/// Header, question and OPT of a response, with TC set; without OPT if that does not fit `room`.
/// `None` if not even the question fits, or the message has none.
pub fn truncate(response: &[u8], room: usize) -> Option<Vec<u8>> {
    if !is_response(response) || be16(response, 4) != 1 {
        return None;
    }
    let end = question_end(response).filter(|&end| end <= room)?;
    let opt = find_opt(response, end).filter(|opt| end + opt.len() <= room);
    let mut cut = response[..end].to_vec();
    cut[2] |= FLAG_TC;
    cut[6..HEADER_LEN].fill(0);
    if let Some(opt) = opt {
        cut[11] = 1;
        cut.extend_from_slice(&response[opt]);
    }
    Some(cut)
}

/// OPT of a response whose question ends at `at`.
fn find_opt(response: &[u8], mut at: usize) -> Option<Range<usize>> {
    let records =
        u32::from(be16(response, 6)) + u32::from(be16(response, 8)) + u32::from(be16(response, 10));
    for _ in 0..records {
        let record = Record::parse(response, at)?;
        if record.kind == TYPE_OPT && record.fixed_at == at + 1 {
            return Some(at..record.end);
        }
        at = record.end;
    }
    None
}

/// End of the first question. It can't be compressed: there is nothing before it to point to.
pub fn question_end(bytes: &[u8]) -> Option<usize> {
    let mut at = HEADER_LEN;
    loop {
        let len = *bytes.get(at)?;
        at += 1;
        match len {
            0 => break,
            1..=LABEL_LEN_MAX => at += usize::from(len),
            _ => return None,
        }
        if at - HEADER_LEN >= NAME_LEN_MAX {
            return None;
        }
    }
    let end = at + 4;
    (end <= bytes.len()).then_some(end)
}

struct Record {
    kind: u16,
    class: u16,
    ttl_secs: u32,
    /// Where the fixed fields start: behind the name.
    fixed_at: usize,
    /// Where it ends: behind its data.
    end: usize,
}

impl Record {
    fn parse(bytes: &[u8], at: usize) -> Option<Self> {
        Self::behind_name(bytes, name_end(bytes, at)?)
    }

    fn behind_name(bytes: &[u8], fixed_at: usize) -> Option<Self> {
        let fixed = bytes.get(fixed_at..fixed_at + RECORD_FIXED_LEN)?;
        let end = fixed_at + RECORD_FIXED_LEN + usize::from(be16(fixed, 8));
        // RFC 2181 8: a TTL with its top bit set counts as 0.
        let ttl = u32::from(be16(fixed, 4)) << 16 | u32::from(be16(fixed, 6));
        (end <= bytes.len()).then_some(Self {
            kind: be16(fixed, 0),
            class: be16(fixed, 2),
            ttl_secs: if ttl >> 31 == 0 { ttl } else { 0 },
            fixed_at,
            end,
        })
    }
}

/// End of a name that may end in a compression pointer, which is stepped over, never followed: no
/// loops.
fn name_end(bytes: &[u8], mut at: usize) -> Option<usize> {
    let start = at;
    loop {
        let len = *bytes.get(at)?;
        match len {
            0 => return Some(at + 1),
            1..=LABEL_LEN_MAX => at += 1 + usize::from(len),
            0xc0.. => return Some(at + 2),
            _ => return None,
        }
        if at - start >= NAME_LEN_MAX {
            return None;
        }
    }
}

#[cfg(test)]
mod tests;
