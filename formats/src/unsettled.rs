//! Places of the disk whose mapping was changed and may not be safe against the death of the process yet ([`crate::metadata`] says what
//! *settled* is). A write to such a place must not be acknowledged before its mapping is settled, so a driver does not call it in
//! place: the write comes by a plan, whose commit waits. This covers commits whose settling failed, too.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;

/// See the module. Places are known by a number of the driver's choice.
#[derive(Debug, Default)]
pub(crate) struct Unsettled {
    changes: RefCell<BTreeMap<u64, u64>>,
    last: Cell<u64>,
}

impl Unsettled {
    /// The mapping of a place is changed now.
    pub fn note(&self, place: u64) {
        self.last.set(self.last.get() + 1);
        self.changes.borrow_mut().insert(place, self.last.get());
    }

    /// The mapping of a place may not be settled.
    pub fn contains(&self, place: u64) -> bool {
        let changes = self.changes.borrow();
        !changes.is_empty() && changes.contains_key(&place)
    }

    /// The changes so far, for [`Unsettled::settled`].
    pub fn so_far(&self) -> u64 {
        self.last.get()
    }

    /// Everything that was noted when `so_far` was asked for is settled.
    pub fn settled(&self, so_far: u64) {
        self.changes.borrow_mut().retain(|_, change| *change > so_far);
    }
}

#[cfg(test)]
mod tests {
    /// Goal: a place is unsettled from its change until a settling that began behind the change. Method: two changes of one place
    /// around the begin of a settling.
    #[test]
    fn a_change_during_the_settling_is_not_settled_by_it() {
        let unsettled = super::Unsettled::default();
        unsettled.note(7);
        unsettled.note(8);
        let so_far = unsettled.so_far();
        unsettled.note(7);
        unsettled.settled(so_far);
        assert_eq!([7, 8, 9].map(|place| unsettled.contains(place)), [true, false, false]);
        unsettled.settled(unsettled.so_far());
        assert!(!unsettled.contains(7));
    }
}
