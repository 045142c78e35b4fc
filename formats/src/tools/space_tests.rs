//! Goal: a new copy has space for exactly what it holds, although it is given space before anybody knows which data are zero.
//! Method: a target file that notes which of its blocks have space: what was reserved or written and not zeroed since. The source has
//! data blocks that are zero in every proportion.

use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;

use super::copy::{Target, copy};
use super::walk::Depth;
use crate::driver::{Driver, Open};
use crate::error::Error;
use crate::file::{Buf, ImageFile, Pending};
use crate::metadata::Budget;
use crate::testing::rig::{Case, LayerCase, Rig, read_all, write};
use crate::volume::{Layer, Volume};

const BLOCK: u64 = 4096;
const SIZE: u64 = 2 << 20;

/// A file that knows which of its blocks have space.
#[derive(Debug)]
struct Spacious {
    file: Rc<dyn ImageFile>,
    space: RefCell<Vec<bool>>,
    reserved: RefCell<u64>,
}

impl Spacious {
    fn note(&self, range: Range<u64>, has: bool) {
        let blocks = range.start / BLOCK..range.end.div_ceil(BLOCK);
        self.space.borrow_mut()[blocks.start as usize..blocks.end as usize].fill(has);
    }
}

impl ImageFile for Spacious {
    fn name(&self) -> &str {
        self.file.name()
    }
    fn length(&self) -> u64 {
        self.file.length()
    }
    fn is_device(&self) -> bool {
        false
    }
    fn is_writable(&self) -> bool {
        true
    }
    fn read(&self, offset: u64, len: usize) -> Pending<'static, Buf> {
        self.file.read(offset, len)
    }
    fn write(&self, offset: u64, data: Buf) -> Pending<'static, ()> {
        self.note(offset..offset + data.len() as u64, true);
        self.file.write(offset, data)
    }
    fn flush(&self) -> Pending<'static, ()> {
        self.file.flush()
    }
    fn extend(&self, length: u64) -> Pending<'static, ()> {
        self.file.extend(length)
    }
    fn truncate(&self, length: u64) -> Pending<'static, ()> {
        self.file.truncate(length)
    }
    fn zero(&self, range: Range<u64>) -> Pending<'static, ()> {
        self.note(range.clone(), false);
        self.file.zero(range)
    }
    fn reserve(&self, range: Range<u64>) -> Pending<'static, bool> {
        *self.reserved.borrow_mut() += range.end - range.start;
        self.note(range, true);
        Box::pin(std::future::ready(Ok(true)))
    }
}

async fn raw(file: Rc<dyn ImageFile>) -> Result<Volume, Error> {
    let open = Open {
        files: vec![file.clone()],
        writable: true,
        below_size: None,
        budget: Budget::new(1 << 20),
        log: None,
        snapshot: None,
        key: None,
    };
    let driver: Rc<dyn Driver> = crate::registry::format("raw").expect("known").open(open).await?;
    Volume::new(vec![Layer { driver, files: vec![file] }])
}

#[test]
fn a_new_copy_has_space_for_what_it_holds() {
    // Of so many blocks one holds data.
    for every in [1, 2, 7, 8, 9, 64, u64::MAX] {
        let layer = LayerCase::new(crate::registry::format("raw").expect("known"), &[], SIZE);
        let rig = Rig::create(&Case::new("raw", vec![layer]), 1).expect("made");
        let file = Rc::new(Spacious {
            file: rig.store.open(0, true),
            space: RefCell::new(vec![false; (SIZE / BLOCK) as usize]),
            reserved: RefCell::default(),
        });
        let holds = |block: u64| block % every == every - 1;
        rig.store.run(async {
            let source = rig.store.add("mem/source", crate::testing::Pages::empty());
            source.extend(SIZE).await.expect("room");
            let source = raw(source).await.expect("open");
            for block in (0..SIZE / BLOCK).filter(|&block| holds(block)) {
                write(&source, block * BLOCK, &[7; BLOCK as usize]).await.expect("written");
            }
            file.zero(0..SIZE).await.expect("empty");
            let target = raw(file.clone()).await.expect("open");
            let copied =
                copy((&source, Depth::Chain), 0..SIZE, (&target, Target::New), 0, &()).await.expect("copied");
            assert_eq!(copied.data + copied.zero, SIZE);
            assert_eq!(read_all(&target).await, read_all(&source).await);
        });
        assert!(*file.reserved.borrow() > 0, "space is asked for");
        for (block, has) in (0u64..).zip(file.space.borrow().iter()) {
            assert_eq!(*has, holds(block), "block {block}, one of {every} holds data");
        }
    }
}
