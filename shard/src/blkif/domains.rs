//! The domains of a shard: the hypervisor's, and clients that share memory in their stead. Each kind is opened when its first guest
//! comes and stays open.

use std::sync::Arc;

use ring_bridge::blkif::ring::Ring;
use ring_bridge::grants::{Domains, Domid, Event, Gref, Pages, Port};
use ring_bridge::memory::SharedRegion;

use super::connect::{Realm, Transport};
use crate::storage::grants::CopyBatch;
use crate::storage::pool::Pool;

/// Segments of one call at most: those of 1 MiB. What a turn may start bounds the calls of a turn.
const COPY_SEGMENTS_MAX: usize = 256;
/// Rounds of one look for events; what is left then waits for the next turn.
const DRAINS_MAX: u32 = 16;

/// The engine of a guest's ring.
pub(crate) type Engine = Ring<Pages, SharedRegion>;

/// Domains of one kind, and what is to be done with them in this turn.
#[derive(Debug)]
pub(crate) struct Opened {
    pub domains: Domains,
    pub batch: CopyBatch,
    /// Ports to be unmasked at the end of the turn.
    pub unmask: Vec<Port>,
}

impl Opened {
    /// Makes the copies that are planned.
    pub fn copy(&mut self, pool: &mut Pool, failed: impl FnMut(u32)) {
        if !self.batch.is_empty() {
            self.batch.run(pool, &mut self.domains, failed);
        }
    }

    /// Appends pending events; whether there are more.
    pub fn drain(&mut self, events: &mut Vec<Event>) -> bool {
        (0..DRAINS_MAX).all(|_| self.domains.drain(events))
    }
}

/// All domains of a shard.
#[derive(Debug, Default)]
pub(crate) struct Host {
    realms: [Option<Opened>; Realm::ALL.len()],
}

impl Host {
    /// The domains of a kind, if a guest of that kind has ever been here.
    pub fn get(&mut self, realm: Realm) -> Option<&mut Opened> {
        self.realms[realm as usize].as_mut()
    }

    /// Kinds that are open.
    pub fn open_realms(&self) -> usize {
        self.realms.iter().flatten().count()
    }

    /// The domains of a kind; opens them. True: they have just been opened.
    ///
    /// # Errors
    /// A sentence for the operator.
    pub fn open(&mut self, realm: Realm) -> Result<(&mut Opened, bool), String> {
        let place = &mut self.realms[realm as usize];
        let new = place.is_none();
        if new {
            let mut domains = match realm {
                Realm::Xen => Domains::open_xen().map_err(|error| error.to_string())?,
                Realm::Shared => Domains::open_memfd().map_err(|error| error.to_string())?,
            };
            domains.set_copy_segments_max(COPY_SEGMENTS_MAX);
            *place = Some(Opened { domains, batch: CopyBatch::default(), unmask: Vec::new() });
        }
        let opened = place.as_mut().ok_or_else(|| "no domains".to_owned())?;
        Ok((opened, new))
    }

    /// Makes a client's memory known under the number of its domain.
    ///
    /// # Errors
    /// A sentence: the number is taken.
    pub fn enter(&mut self, domid: Domid, transport: Transport) -> Result<(), String> {
        let Transport::Shared { memory, channels } = transport else { return Ok(()) };
        let clients = self.get(Realm::Shared).and_then(|opened| opened.domains.clients());
        let clients = clients.ok_or_else(|| "no clients with shared memory are served".to_owned())?;
        clients.add(domid, memory, channels).map_err(|error| error.to_string())
    }

    /// Forgets a domain's memory, if it is shared; none of its ports is bound any more.
    pub fn leave(&mut self, realm: Realm, domid: Domid) -> Option<Transport> {
        match realm {
            Realm::Xen => Some(Transport::Xen),
            Realm::Shared => {
                let (memory, channels) = self.get(realm)?.domains.clients()?.remove(domid)?;
                Some(Transport::Shared { memory, channels })
            }
        }
    }

    /// Finds the page that cannot be mapped, after all together could not.
    pub fn bad_page(&mut self, realm: Realm, domid: Domid, grefs: &[Gref]) -> Option<usize> {
        let opened = self.get(realm)?;
        grefs.iter().position(|&gref| opened.domains.map_ring(domid, &[gref]).is_err())
    }
}

/// Counters of the domains of a shard, for metrics: each appears when its kind is opened.
#[derive(Debug, Default)]
pub struct GrantAccounts {
    realms: [std::sync::OnceLock<Arc<ring_bridge::grants::Accounts>>; Realm::ALL.len()],
}

impl GrantAccounts {
    /// The counters of a kind, if it was ever opened.
    pub fn get(&self, realm: Realm) -> Option<&Arc<ring_bridge::grants::Accounts>> {
        self.realms[realm as usize].get()
    }

    pub(crate) fn set(&self, realm: Realm, accounts: &Arc<ring_bridge::grants::Accounts>) {
        // Opened once in the life of a shard.
        let _ = self.realms[realm as usize].set(accounts.clone());
    }
}
