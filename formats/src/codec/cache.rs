//! Units that were decoded last, in the memory that a shard has for tables.
//!
//! A guest reads a compressed cluster in small requests; without this each of them would read and decode all of it. Several that
//! ask for one unit at a time have it decoded once.
//!
//! *How long that keeps others waiting*: when an image has had [`TURN_BYTES`] decoded, the next one waits until everybody else has had
//! a turn. So in one turn of a shard at most that much and one unit is decoded for each image: some 0.2 ms of work with
//! clusters of 64 KiB.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;

use futures_lite::future::yield_now;

use super::{Damaged, Method};
use crate::error::Error;
use crate::file::{Buf, Pending};
use crate::metadata::{Budget, Holder};

/// Bytes that are decoded for an image before others get their turn.
pub const TURN_BYTES: usize = 64 << 10;
/// Part of the budget that the units of one image may take.
const SHARE: usize = 4;
/// What a unit takes beside its bytes, about.
const ENTRY_BYTES: usize = 128;
/// Units that are read at the same time.
const LOADS: usize = 32;

#[derive(Debug)]
struct Unit {
    bytes: Rc<[u8]>,
    /// Its key in the order of use.
    used: u64,
}

#[derive(Debug, Default)]
struct Units {
    by_place: HashMap<u64, Unit, foldhash::fast::FixedState>,
    /// The one that was used longest ago comes first.
    by_use: BTreeMap<u64, u64>,
    uses: u64,
    bytes: usize,
}

impl Units {
    fn get(&mut self, place: u64) -> Option<Rc<[u8]>> {
        let unit = self.by_place.get_mut(&place)?;
        self.by_use.remove(&unit.used);
        self.uses += 1;
        unit.used = self.uses;
        self.by_use.insert(self.uses, place);
        Some(unit.bytes.clone())
    }

    /// Takes a unit out; returns the memory that it took.
    fn remove(&mut self, place: u64) -> usize {
        let Some(unit) = self.by_place.remove(&place) else { return 0 };
        self.by_use.remove(&unit.used);
        let taken = unit.bytes.len() + ENTRY_BYTES;
        self.bytes -= taken;
        taken
    }
}

/// The decoded units of one image, by the place of their encoded bytes. See the module.
pub struct Decoded {
    budget: Rc<Budget>,
    units: RefCell<Units>,
    loads: [async_lock::Mutex<()>; LOADS],
    /// Held by who decodes.
    turn: async_lock::Mutex<()>,
    /// Bytes that were decoded in this turn.
    decoded: Cell<usize>,
}

impl Decoded {
    /// An empty one.
    pub fn new(budget: &Rc<Budget>) -> Rc<Decoded> {
        let decoded = Rc::new(Decoded {
            budget: budget.clone(),
            units: RefCell::default(),
            loads: [const { async_lock::Mutex::new(()) }; LOADS],
            turn: async_lock::Mutex::new(()),
            decoded: Cell::new(0),
        });
        budget.join(&(decoded.clone() as Rc<dyn Holder>));
        decoded
    }

    /// The `len` bytes of the unit whose encoded bytes are at `place`, which `read` gives.
    ///
    /// # Errors
    /// What `read` answers; or the unit is damaged, which `name` is told as the error of an image.
    pub async fn get(
        &self,
        place: u64,
        method: Method,
        len: usize,
        read: impl FnOnce() -> Pending<'static, Buf>,
        name: impl FnOnce(Damaged) -> Error,
    ) -> Result<Rc<[u8]>, Error> {
        if let Some(bytes) = self.units.borrow_mut().get(place) {
            return Ok(bytes);
        }
        let _load = self.loads[(place / 512) as usize % LOADS].lock().await;
        if let Some(bytes) = self.units.borrow_mut().get(place) {
            return Ok(bytes);
        }
        let encoded = read().await?;
        let decoded = {
            let _turn = self.turn.lock().await;
            if self.decoded.get() >= TURN_BYTES {
                self.decoded.set(0);
                yield_now().await;
            }
            self.decoded.set(self.decoded.get() + len);
            super::decode(method, &encoded, len)
        };
        let bytes: Rc<[u8]> = decoded.map_err(name)?.into();
        self.keep(place, &bytes);
        Ok(bytes)
    }

    /// What is at `place` from now on is something else.
    pub fn forget(&self, place: u64) {
        let freed = self.units.borrow_mut().remove(place);
        self.budget.give_back(freed);
    }

    fn keep(&self, place: u64, bytes: &Rc<[u8]>) {
        let need = bytes.len() + ENTRY_BYTES;
        let most = self.budget.limit_bytes() / SHARE;
        if need > most {
            return;
        }
        while self.held_bytes() + need > most && self.evict() {}
        self.budget.make_room(self, need);
        let mut units = self.units.borrow_mut();
        debug_assert!(!units.by_place.contains_key(&place), "whoever loads a place has its lock");
        units.uses += 1;
        let used = units.uses;
        units.by_use.insert(used, place);
        units.by_place.insert(place, Unit { bytes: bytes.clone(), used });
        units.bytes += need;
        self.budget.take(need);
    }
}

impl Holder for Decoded {
    fn held_bytes(&self) -> usize {
        self.units.borrow().bytes
    }

    fn may_evict(&self) -> bool {
        !self.units.borrow().by_use.is_empty()
    }

    fn evict(&self) -> bool {
        let mut units = self.units.borrow_mut();
        let Some((_, place)) = units.by_use.first_key_value() else { return false };
        let place = *place;
        let freed = units.remove(place);
        drop(units);
        self.budget.give_back(freed);
        true
    }
}

impl std::fmt::Debug for Decoded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Decoded({} units)", self.units.borrow().by_place.len())
    }
}

impl Drop for Decoded {
    fn drop(&mut self) {
        self.budget.give_back(self.held_bytes());
        self.budget.leave();
    }
}
