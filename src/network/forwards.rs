//! The forwards of a running network: added, listed and removed while it runs.
//!
//! A forward is checked against the others, its sockets are opened here, where there is time to find out
//! who is in the way, and a worker takes them over. Where any of it fails nothing is left behind.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{Network, NetworkError, Shared, lock};
use crate::nat::HostError;
use crate::nat::forward::{
    Direction, ForwardCounters, ForwardError, ForwardId, ForwardSet, ForwardSpec, ListenerKind,
};
use crate::uplink::listen::{self, ListenAt, Listeners, SocketFile};
use crate::worker::Command;

/// How long the workers may take to answer, which they do between two batches.
const WORKER_TIME_MAX: Duration = Duration::from_secs(2);

/// A forward, as `lanlet forward list` shows it.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct ForwardStatus {
    /// Its number.
    pub id: u32,
    /// Its name.
    #[serde(default)]
    pub name: Option<String>,
    /// What it does, as it would be written.
    pub forward: String,
    /// Connections passed on and UDP sessions begun.
    pub opened: u64,
    /// Connections reset and datagrams dropped, because no guest was found or a limit reached.
    pub refused: u64,
    /// Connections that wait for their guest now.
    pub waiting: usize,
}

/// Why a forward can't be had.
#[derive(Debug, thiserror::Error)]
pub enum ForwardRefusal {
    /// It makes no sense on this network, or beside its other forwards.
    #[error("forward {forward}: {cause}")]
    Unfit {
        /// The forward.
        forward: String,
        /// What is wrong.
        cause: ForwardError,
    },
    /// A socket can't be opened.
    #[error("forward {forward}: {cause}")]
    Host {
        /// The forward.
        forward: String,
        /// Which and why.
        cause: listen::ListenError,
    },
    /// The data path did not take the sockets.
    #[error("forward {forward}: the data path can't serve its sockets: {reason}")]
    Worker {
        /// The forward.
        forward: String,
        /// Why.
        reason: String,
    },
    /// There is none of that number, name or words.
    #[error("no forward {words:?}: 'lanlet forward list' shows numbers and names")]
    Unknown {
        /// What was said.
        words: String,
    },
}

/// The forwards and what they keep on the host's disk.
#[derive(Default)]
pub(super) struct Forwards {
    set: ForwardSet,
    files: HashMap<ForwardId, Vec<SocketFile>>,
}

impl Network {
    /// Adds a forward. It is taken whole, or not at all.
    ///
    /// # Errors
    /// What is wrong with it, or who is in its way.
    pub fn add_forward(&self, spec: ForwardSpec) -> Result<ForwardStatus, NetworkError> {
        Ok(self.shared.add_forward(spec)?)
    }

    /// Removes a forward by its number. Connections that came in by it go on, UDP sessions end.
    /// Returns whether there was one.
    pub fn remove_forward(&self, id: ForwardId) -> bool {
        self.shared.remove_forward(id)
    }

    /// The number of the forward that is meant by its number, its name or its own words.
    ///
    /// # Errors
    /// There is none.
    pub fn find_forward(&self, words: &str) -> Result<ForwardId, NetworkError> {
        let found = lock(&self.shared.forwards).set.find(words);
        let words = words.to_owned();
        Ok(found.ok_or(ForwardRefusal::Unknown { words })?)
    }

    /// The forwards, in the order they were added.
    pub fn forwards(&self) -> Vec<ForwardStatus> {
        let snapshot = self.shared.snapshot().unwrap_or_default();
        self.shared.forward_status(&snapshot.forwards)
    }
}

impl Shared {
    pub(super) fn add_forward(&self, spec: ForwardSpec) -> Result<ForwardStatus, ForwardRefusal> {
        // Held to the end: of two forwards with one port the second is to hear of the first.
        let mut forwards = lock(&self.forwards);
        let forward = spec.to_string();
        let unfit = |cause| ForwardRefusal::Unfit {
            forward: forward.clone(),
            cause,
        };
        ForwardSet::check_on(&spec, &self.lan).map_err(unfit)?;
        forwards.set.check(&spec).map_err(unfit)?;
        let Listeners { sockets, chosen } = match &spec.direction {
            Direction::ToGuest { listen, .. } => {
                listen::open(listen).map_err(|cause| ForwardRefusal::Host {
                    forward: forward.clone(),
                    cause,
                })?
            }
            Direction::ToHost { .. } => Listeners {
                sockets: Vec::new(),
                chosen: None,
            },
        };
        let spec = match chosen {
            Some(port) => spec.with_host_port(port),
            None => spec,
        };
        let mut files = Vec::new();
        let mut owned = Vec::new();
        for socket in sockets {
            let kind = match socket.at {
                ListenAt::Tcp(at) => ListenerKind::Tcp(at),
                ListenAt::Udp(at) => ListenerKind::Udp(at),
                ListenAt::Unix(file, allow_guests) => {
                    files.push(file);
                    ListenerKind::Unix(allow_guests)
                }
            };
            owned.push((Some(socket.fd), kind));
        }
        let id = forwards.set.add(spec.clone()).map_err(unfit)?;
        let (reply, answers_of) = crossbeam_channel::bounded(self.crew.members().len());
        let words = spec.to_string();
        let name = spec.name.as_ref().map(ToString::to_string);
        let kinds: Vec<_> = owned.iter().map(|&(_, kind)| (None, kind)).collect();
        let add = |sockets| Command::AddForward {
            id,
            spec: Box::new(spec.clone()),
            sockets,
            reply: reply.clone(),
        };
        // One of them has the sockets, and hears of it last: if the guest is another's, it gives them
        // away, to one who has to know the forward.
        if let Some((first, others)) = self.crew.members().split_first() {
            let elsewhere = |&(_, kind): &(Option<OwnedFd>, _)| (None, kind);
            for other in others {
                other.send(add(kinds.iter().map(elsewhere).collect()));
            }
            first.send(add(owned));
        }
        drop(reply);
        let deadline = Instant::now() + WORKER_TIME_MAX;
        let answers = self.crew.members().iter();
        let mut answers = answers.map(|_| answers_of.recv_deadline(deadline));
        let failed = answers.find(|answer| !matches!(answer, Ok(Ok(()))));
        let refused = match failed.unwrap_or(Ok(Ok(()))) {
            Ok(Ok(())) => None,
            Ok(Err(HostError::Exhausted)) => Some(
                "no open file is left: raise the limit (ulimit -n), or forward fewer ports"
                    .to_owned(),
            ),
            Ok(Err(error)) => Some(format!("{error:?}")),
            Err(error) => Some(error.to_string()),
        };
        if let Some(reason) = refused {
            forwards.set.remove(id);
            self.crew.tell_all(|_| Command::RemoveForward(id));
            return Err(ForwardRefusal::Worker { forward, reason });
        }
        forwards.files.insert(id, files);
        log::debug!("forward {id} added: {words}");
        Ok(ForwardStatus {
            id: id.0,
            name,
            forward: words,
            ..ForwardStatus::default()
        })
    }

    fn remove_forward(&self, id: ForwardId) -> bool {
        let mut forwards = lock(&self.forwards);
        let removed = forwards.set.remove(id);
        if removed.is_some() {
            // The file first: who connects from here on is told so, and does not wait in vain.
            forwards.files.remove(&id);
            self.crew.tell_all(|_| Command::RemoveForward(id));
            // Its ports are free when this returns: the snapshot is taken after the removal.
            let _ = self.snapshot();
            log::debug!("forward {id} removed");
        }
        removed.is_some()
    }

    pub(super) fn forward_status(
        &self,
        counters: &[(ForwardId, ForwardCounters)],
    ) -> Vec<ForwardStatus> {
        let forwards = lock(&self.forwards);
        let status = |(id, spec): (ForwardId, &ForwardSpec)| {
            let of_it = counters.iter().find(|(of, _)| *of == id);
            let counters = of_it.map_or(ForwardCounters::default(), |&(_, counters)| counters);
            ForwardStatus {
                id: id.0,
                name: spec.name.as_ref().map(ToString::to_string),
                forward: spec.to_string(),
                opened: counters.opened,
                refused: counters.refused,
                waiting: counters.waiting,
            }
        };
        forwards.set.iter().map(status).collect()
    }

    /// The network ends: socket files go.
    pub(super) fn drop_forward_files(&self) {
        lock(&self.forwards).files.clear();
    }
}
