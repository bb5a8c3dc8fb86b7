//! The egress policy of a network: put in force while it runs, and asked by the resolver about DNS over
//! TCP, which does not pass the worker.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::RecvTimeoutError;
use tokio::sync::oneshot;

use super::{Network, NetworkError, lock};
use crate::control::resolver::NamePolicy;
use crate::frame::PortId;
use crate::gateway::dns::message::Name;
use crate::nat::policy::Policy;
use crate::worker::{Command, Crew};

/// How long the workers may take to review all flows. It takes milliseconds, unless there are both a great
/// many rules and guests out to make it long (`nat/policy.rs`); less than a client waits for a reply.
const REVIEW_TIMEOUT: Duration = Duration::from_secs(5);

impl Network {
    /// Puts another egress policy in force, or none. Once this returns, what it denies has ended.
    ///
    /// # Errors
    /// The data path has ended, or did not answer in time (the policy is in force when it does).
    pub fn set_policy(&self, policy: Option<Policy>) -> Result<(), NetworkError> {
        let policy = policy.map(Arc::new);
        let (done, is_done) = crossbeam_channel::bounded(self.shared.crew.members().len());
        // Held until it is sent, so that of two the one that is shown is in force.
        let mut current = lock(&self.shared.policy);
        current.clone_from(&policy);
        self.shared.crew.tell_all(|_| Command::SetPolicy {
            policy: policy.clone(),
            done: done.clone(),
        });
        drop((current, done));
        let deadline = Instant::now() + REVIEW_TIMEOUT;
        for _ in self.shared.crew.members() {
            match is_done.recv_deadline(deadline) {
                Ok(()) => {}
                Err(RecvTimeoutError::Timeout) => return Err(NetworkError::Busy),
                Err(RecvTimeoutError::Disconnected) => {
                    let end = lock(&self.shared.end).clone();
                    return Err(NetworkError::Ended(end.flatten()));
                }
            }
        }
        Ok(())
    }

    /// The egress policy in force.
    pub fn policy(&self) -> Option<Arc<Policy>> {
        lock(&self.shared.policy).clone()
    }
}

/// Asks the worker that the guest's port is at home with: it has what the guest resolved.
pub(super) struct AskWorker(pub Crew);

impl NamePolicy for AskWorker {
    fn allows(&self, port: PortId, name: &Name) -> Option<oneshot::Receiver<bool>> {
        let (reply, decided) = oneshot::channel();
        let name = Box::new(*name);
        self.0
            .home(port)
            .send(Command::DecideName { port, name, reply });
        Some(decided)
    }

    fn on_answer(&self, port: PortId, answer: &[u8]) -> Option<oneshot::Receiver<()>> {
        let (done, is_done) = oneshot::channel();
        let message = answer.into();
        self.0.home(port).send(Command::Pin {
            port,
            message,
            done,
        });
        Some(is_done)
    }
}
