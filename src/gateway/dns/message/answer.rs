//! The answer section of a response, for who has to know which addresses a name was given.

use std::net::{Ipv4Addr, Ipv6Addr};

use super::{CLASS_IN, HEADER_LEN, Name, RECORD_FIXED_LEN, Record, is_response, question_end};
use crate::wire::be16;

/// Record types (RFC 1035 3.2.2, RFC 3596 2.1).
const TYPE_A: u16 = 1;
const TYPE_CNAME: u16 = 5;
const TYPE_AAAA: u16 = 28;

/// A record of an answer section.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Answer<'a> {
    /// The name that the record is about. It need not be the one asked for: behind an
    /// [`AnswerData::Alias`] it is the alias's target.
    pub name: Name,
    /// How many seconds the record may be kept.
    pub ttl_secs: u32,
    /// What it says.
    pub data: AnswerData<'a>,
}

/// What a record says.
// One at a time, on the stack: a box for the name would be an allocation for each alias.
#[allow(clippy::large_enum_variant)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AnswerData<'a> {
    /// A.
    V4(Ipv4Addr),
    /// AAAA.
    V6(Ipv6Addr),
    /// CNAME: the name is another's alias.
    Alias(Name),
    /// Any other type, or class; the data can hold compressed names.
    Other {
        /// Its type.
        kind: u16,
        /// Its data as it stands there.
        data: &'a [u8],
    },
}

/// The rest of the message can't be read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Malformed;

/// The records of an answer section, in order. The first error is the last item.
///
/// A record takes 11 bytes at least and a name is bounded ([`Name`]), so the longest message there is
/// gives some 6,000 records and bounded work for each.
#[derive(Clone, Debug)]
pub struct Answers<'a> {
    response: &'a [u8],
    at: usize,
    left: u16,
}

/// The answer section of `response`; `None` if that is no response to one question.
pub fn answers(response: &[u8]) -> Option<Answers<'_>> {
    if !is_response(response) || be16(response, 4) != 1 {
        return None;
    }
    Some(Answers {
        response,
        at: question_end(response)?,
        left: be16(response, 6),
    })
}

/// The name that a query or response asks for; `None` if there is not exactly one question.
pub fn question_name(message: &[u8]) -> Option<Name> {
    if message.len() < HEADER_LEN || be16(message, 4) != 1 {
        return None;
    }
    question_end(message)?;
    Name::parse(message, HEADER_LEN).map(|(name, _)| name)
}

impl<'a> Iterator for Answers<'a> {
    type Item = Result<Answer<'a>, Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        self.left = self.left.checked_sub(1)?;
        let answer = self.read();
        if answer.is_none() {
            self.left = 0;
        }
        Some(answer.ok_or(Malformed))
    }
}

impl<'a> Answers<'a> {
    fn read(&mut self) -> Option<Answer<'a>> {
        let response = self.response;
        let (name, fixed_at) = Name::parse(response, self.at)?;
        let record = Record::behind_name(response, fixed_at)?;
        self.at = record.end;
        let data_at = fixed_at + RECORD_FIXED_LEN;
        let data = &response[data_at..record.end];
        let data = match (record.class, record.kind) {
            (CLASS_IN, TYPE_A) => AnswerData::V4(<[u8; 4]>::try_from(data).ok()?.into()),
            (CLASS_IN, TYPE_AAAA) => AnswerData::V6(<[u8; 16]>::try_from(data).ok()?.into()),
            (CLASS_IN, TYPE_CNAME) => {
                let (target, end) = Name::parse(response, data_at)?;
                AnswerData::Alias((end == record.end).then_some(target)?)
            }
            (_, kind) => AnswerData::Other { kind, data },
        };
        Some(Answer {
            name,
            ttl_secs: record.ttl_secs,
            data,
        })
    }
}
