//! Kernel operations that are out, each in a slot with a generation, so that a completion that comes late finds nobody else's.

use crate::blkif::Realm;
use crate::disk::{Mem, SideTarget, Target};
use crate::request::ReqKey;

/// What an operation is for.
#[derive(Debug)]
pub(super) enum OpKind {
    /// Commands or side results have come.
    Inbox,
    /// Ports of guests have something to say.
    Ports { realm: Realm },
    /// Bytes of a request.
    Io(IoOp),
    /// fdatasync of a disk.
    Sync { disk: u32 },
    /// fallocate of a disk for a group of requests.
    Fallocate { disk: u32, group: u32 },
    /// A side job of a disk.
    Side { disk: u32, target: SideTarget },
    /// A connection receives.
    Recv { conn: u32 },
    /// A connection sends.
    Send { conn: u32 },
    /// A cancel: its completion says nothing.
    Cancel,
}

#[cfg(test)]
impl OpKind {
    /// The disk that it works for.
    pub fn disk(&self) -> Option<u32> {
        match *self {
            OpKind::Io(IoOp { disk, .. })
            | OpKind::Sync { disk }
            | OpKind::Fallocate { disk, .. }
            | OpKind::Side { disk, .. } => Some(disk),
            OpKind::Inbox
            | OpKind::Ports { .. }
            | OpKind::Recv { .. }
            | OpKind::Send { .. }
            | OpKind::Cancel => None,
        }
    }
}

/// A read or write that may take several tries.
#[derive(Debug, Clone, Copy)]
pub(super) struct IoOp {
    pub disk: u32,
    pub req: ReqKey,
    pub write: bool,
    pub target: Target,
    pub mem: Mem,
    pub fd: i32,
    pub addr: usize,
    pub offset: u64,
    pub len: u32,
    /// Bytes that earlier tries moved.
    pub done: u32,
    pub tries: u8,
    /// Counts against the store's bound of punted work, and may be punted. Else it is tried without waiting.
    pub gated: bool,
}

#[derive(Debug)]
struct Slot {
    generation: u32,
    kind: Option<OpKind>,
}

/// All operations.
#[derive(Debug, Default)]
pub(super) struct Ops {
    slots: Vec<Slot>,
    free: Vec<u32>,
    /// Reads and writes among those that are out.
    ios: u32,
}

impl Ops {
    /// How many are out.
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Reads and writes that are out.
    pub fn ios(&self) -> u32 {
        self.ios
    }

    /// All that are out.
    #[cfg(test)]
    pub fn iter(&self) -> impl Iterator<Item = &OpKind> {
        self.slots.iter().filter_map(|slot| slot.kind.as_ref())
    }

    /// Takes a slot; returns the user data of the operation.
    pub fn insert(&mut self, kind: OpKind) -> u64 {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot { generation: 0, kind: None });
            self.slots.len() as u32 - 1
        });
        self.ios += u32::from(matches!(kind, OpKind::Io(_)));
        let slot = &mut self.slots[index as usize];
        slot.kind = Some(kind);
        u64::from(slot.generation) << 32 | u64::from(index)
    }

    fn index(&self, user_data: u64) -> Option<usize> {
        let (generation, index) = ((user_data >> 32) as u32, user_data as u32 as usize);
        let slot = self.slots.get(index)?;
        (slot.generation == generation && slot.kind.is_some()).then_some(index)
    }

    /// What an operation is for, if it is out.
    pub fn get(&self, user_data: u64) -> Option<&OpKind> {
        self.slots[self.index(user_data)?].kind.as_ref()
    }

    /// Frees the slot of a finished operation.
    pub fn remove(&mut self, user_data: u64) -> Option<OpKind> {
        let index = self.index(user_data)?;
        let slot = &mut self.slots[index];
        // The top bit stays clear: user data with all bits set is the timer's.
        slot.generation = slot.generation.wrapping_add(1) & 0x7fff_ffff;
        self.free.push(index as u32);
        self.ios -= u32::from(matches!(slot.kind, Some(OpKind::Io(_))));
        slot.kind.take()
    }
}
