//! What the NATs of a network's workers have in common.
//!
//! Each port has one home: the worker whose NAT has the flows of the guests behind it. Frames for the
//! gateway go there whoever read them, and a forward goes where its guest is, so that no flow is
//! looked for in two places and no flow table is shared.

use std::sync::atomic::{AtomicU8, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::frame::{PortId, WorkerId};
use crate::gateway::LanConfig;
use crate::gateway::neighbor::Neighbors;
use crate::nat::shares::Held;
use crate::nat::tcp::budget::{self, Budget};
use crate::switch::PORTS_MAX;

/// The home of each port; of one that is not there, the first worker.
#[derive(Debug)]
pub struct Homes(Box<[AtomicU8]>);

impl Default for Homes {
    fn default() -> Self {
        Self((0..PORTS_MAX).map(|_| AtomicU8::new(0)).collect())
    }
}

impl Homes {
    /// The worker whose NAT has the port's flows.
    #[inline]
    pub fn of(&self, port: PortId) -> WorkerId {
        let home = self.0.get(usize::from(port.0));
        WorkerId(home.map_or(0, |home| home.load(Relaxed)))
    }

    /// Gives a port a home. It must have no flows elsewhere.
    pub fn set(&self, port: PortId, worker: WorkerId) {
        if let Some(home) = self.0.get(usize::from(port.0)) {
            home.store(worker.0, Relaxed);
        }
    }
}

/// What a network's NATs share, as one of them sees it.
#[derive(Clone, Debug)]
pub struct Common {
    /// Whose NAT this is.
    pub worker: WorkerId,
    /// Where the ports' flows are.
    pub homes: Arc<Homes>,
    /// Who has the TCP flows of all workers.
    pub flows: Arc<Held>,
    /// Memory of those flows' rings.
    pub memory: Arc<Budget>,
    /// Where guests are. Locked for ARP, Neighbor Discovery and by forwards, never for a guest's data nor
    /// while anything is sent.
    neighbors: Arc<Mutex<Neighbors>>,
}

impl Common {
    /// Of a network whose first worker this is.
    pub fn new(lan: &LanConfig, homes: Arc<Homes>) -> Self {
        Self {
            worker: WorkerId::default(),
            homes,
            flows: Arc::default(),
            memory: Arc::new(Budget::new(budget::DEFAULT)),
            neighbors: Arc::new(Mutex::new(Neighbors::new(lan.clone()))),
        }
    }

    /// The same with another budget.
    pub fn with_memory(self, tcp_memory: usize) -> Self {
        Self {
            memory: Arc::new(Budget::new(tcp_memory)),
            ..self
        }
    }

    /// The same for another worker.
    pub fn for_worker(&self, worker: WorkerId) -> Self {
        Self {
            worker,
            ..self.clone()
        }
    }

    /// Whether this worker speaks where one has to speak for all.
    pub fn is_first(&self) -> bool {
        self.worker == WorkerId::default()
    }

    /// The worker that has a port's flows, where that is another one.
    #[inline]
    pub fn elsewhere(&self, port: PortId) -> Option<WorkerId> {
        Some(self.homes.of(port)).filter(|&home| home != self.worker)
    }

    /// Where guests are.
    pub fn neighbors(&self) -> MutexGuard<'_, Neighbors> {
        // Each entry is whole at any time.
        self.neighbors
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
