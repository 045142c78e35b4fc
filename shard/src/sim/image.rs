//! Disks of the simulation that are images: overlays of the toy format over raw files, what these hold, and what the operator does to
//! them.

use std::cell::RefCell;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::sync::Arc;

use formats::blocking::wait;
use formats::crypt::Secret;
use formats::driver::Open;
use formats::error::Error;
use formats::file::{Buf, ImageFile as FormatFile, Pending};
use formats::metadata::Budget;
use formats::testing::toy::{FIRST, Toy};
use formats::volume::{Layer, Memory, Volume, Window};

use super::file::File;
use super::kernel::World;
use super::operator::{Kind, Place};
use super::scenario::{Sim, token};
use crate::api::{Backend, ChainLayer, Command, FileKind, ImageChain, ImageFile, ShardErrorKind};

static TOY: Toy = Toy(None);

/// Most layers of a chain.
const DEPTH_MAX: usize = 4;
/// Bytes of a disk that is to be an image, at most.
pub const SIZE_MAX: u64 = 4 << 20;

/// An empty image for a disk of so many bytes.
fn empty(size: u64) -> Vec<u8> {
    let mut bytes = [&b"toyimage"[..], &size.to_be_bytes()].concat();
    bytes.resize(FIRST as usize, 0);
    bytes
}

/// Another image for a disk.
#[derive(Debug, Default)]
pub struct Swapping {
    /// What it was told to take.
    pub to: Option<Backend>,
    /// What it must be told to take before it runs on: it has none, or nobody knows which.
    pub must: Option<Backend>,
    /// The last swap failed in order: the disk has the image that it had, and can be told so.
    pub failed: bool,
    /// Since it was attached.
    pub was_image: bool,
}

impl Sim {
    /// Gives a paused disk another image, or the one back that it had. False when there is nothing to do.
    pub fn swap(&mut self, disk: usize, shard: usize) -> bool {
        let d = &self.disks[disk];
        if d.is_in_memory() || d.read_only {
            return false;
        }
        let to = match &d.swap.must {
            Some(must) => must.clone(),
            None if self.closing || self.rng.chance(500) => return false,
            None => match (self.rng.below(6), &d.backend) {
                (0, _) => d.backend.clone(),
                (1, _) => Backend::Null,
                // Other programs may have worked on it.
                (2, Backend::Image(chain)) => Backend::Image(Arc::new(ImageChain::clone(chain))),
                _ if d.size > SIZE_MAX => return false,
                _ => match self.overlay(disk) {
                    Some(chain) => Backend::Image(chain),
                    None => return false,
                },
            },
        };
        self.swap_to(disk, shard, to);
        if self.rng.chance(200) {
            self.soon(disk, 2000);
        }
        true
    }

    pub fn swap_to(&mut self, disk: usize, shard: usize, to: Backend) {
        let d = &mut self.disks[disk];
        d.swap.to = Some(to.clone());
        d.swap.was_image |= matches!(to, Backend::Image(_));
        let command = Command::Swap { disk: d.id, backend: to };
        self.world.borrow_mut().set_frozen(disk, false);
        self.command(disk, shard, command, Kind::Swap);
    }

    pub fn swapped(&mut self, disk: usize, result: Result<(), ShardErrorKind>) {
        let busy = self.world.borrow().is_busy(disk);
        let undo = self.rng.chance(300);
        let resumed = matches!(self.ordered(disk), Some(Kind::Resume | Kind::ResumeInDoubt));
        let d = &mut self.disks[disk];
        let Some(to) = d.swap.to.take() else { return };
        let undone = d.swap.must.is_some();
        match result {
            Ok(()) => {
                assert!(!busy || resumed, "another image, with operations in flight");
                let old = d.backend.clone();
                d.swap.must = None;
                if matches!(to, Backend::Null) {
                    d.swap.must = Some(old);
                } else {
                    d.backend = to;
                    if undo && !undone {
                        d.swap.must = Some(old);
                    }
                }
                d.swap.failed = false;
                let frozen = d.paused && !d.failed && !resumed;
                self.world.borrow_mut().set_frozen(disk, frozen);
            }
            // It has not begun.
            Err(ShardErrorKind::WrongState) => {}
            Err(kind) if undone => {
                assert!(
                    !d.swap.failed || d.failed || kind == ShardErrorKind::Interrupted,
                    "disk {disk} did not take the image that it has: {kind:?}"
                );
                if let (Place::Shard(shard), false) = (&d.place, d.zombie || d.failed) {
                    let shard = *shard;
                    self.give_up(disk, shard);
                }
            }
            Err(kind) => {
                d.swap.failed = kind != ShardErrorKind::Interrupted;
                d.swap.must = Some(d.backend.clone());
            }
        }
        self.soon(disk, 5_000);
    }

    pub fn resize(&mut self, disk: usize, shard: usize) {
        let d = &mut self.disks[disk];
        let size = (d.size + 64 * 512).saturating_sub(self.rng.below(80) * 512).max(512);
        // It may have become larger also when the answer is an error.
        d.model.grow(size);
        self.resizes.insert(disk, size);
        let command = Command::Resize { disk: d.id, size_bytes: size };
        self.command(disk, shard, command, Kind::Resize);
    }

    /// The chain with a new overlay over what a disk has. `None` when it has enough of them.
    pub fn overlay(&mut self, disk: usize) -> Option<Arc<ImageChain>> {
        let d = &self.disks[disk];
        let layer =
            |writable, flush| move |layer: &ChainLayer| ChainLayer { writable, flush, ..layer.clone() };
        let mut below: Vec<ChainLayer> = match &d.backend {
            Backend::Image(chain) => chain.layers.iter().map(layer(false, false)).collect(),
            Backend::File(file) => vec![ChainLayer {
                format: formats::registry::format("raw").expect("raw is known"),
                files: vec![file.clone()],
                names: vec!["base".into()],
                writable: false,
                flush: false,
                snapshot: None,
                key: None,
                log: None,
            }],
            Backend::Ram(_) | Backend::Null => return None,
        };
        if below.len() >= DEPTH_MAX {
            return None;
        }
        below[0].flush = true;
        let mut world = self.world.borrow_mut();
        let base = world.file_behind(d.image.fd.as_raw_fd());
        let mut file = File::of(disk, empty(d.size));
        (file.align, file.memory_align) = (base.align.max(1), base.memory_align);
        (file.store, file.cannot_tell, file.faults, file.hung) =
            (base.store, base.cannot_tell, base.faults, base.hung);
        let length = file.length;
        let image = ImageFile {
            fd: token(),
            tail: None,
            offset_align: d.image.offset_align,
            memory_align: d.image.memory_align,
            cache: d.image.cache,
            kind: FileKind::Regular,
            length,
            length_now: length.into(),
            punts: d.image.punts,
            store: d.image.store,
        };
        let index = world.files.len();
        world.register_file(image.fd.as_raw_fd(), index, image.offset_align > 1);
        world.files.push(file);
        // Some are encrypted.
        let key = index.is_multiple_of(3).then(|| Secret::new(vec![7; 64]));
        let top = ChainLayer {
            format: &TOY,
            key,
            files: vec![Arc::new(image)],
            names: vec![format!("overlay{index}").into()],
            writable: true,
            ..below[0].clone()
        };
        let mut layers = vec![ChainLayer { flush: false, ..top }];
        layers.append(&mut below);
        Some(Arc::new(ImageChain { layers }))
    }
}

/// What a disk that is an image holds, as its files are now or as a power loss would leave them.
pub fn contents(world: &World, chain: &ImageChain, durable: bool, ranges: &[Range<u64>]) -> Vec<Vec<u8>> {
    let mut layers: Vec<Layer> = Vec::new();
    for layer in chain.layers.iter().rev() {
        let files: Vec<Rc<dyn FormatFile>> = layer
            .files
            .iter()
            .map(|image| {
                let file = world.file_behind(image.fd.as_raw_fd());
                let bytes = if durable { &file.durable } else { &file.data };
                let bytes = bytes[..bytes.len().min(file.length as usize)].to_vec();
                Rc::new(Bytes(RefCell::new(bytes))) as Rc<dyn FormatFile>
            })
            .collect();
        let open = Open {
            files: files.clone(),
            writable: false,
            below_size: layers.last().map(|below| below.driver.size()),
            budget: Budget::new(1 << 20),
            log: None,
            snapshot: None,
            key: layer.key.clone(),
        };
        let driver = wait(layer.format.open(open)).expect("the image opens");
        layers.push(Layer { driver, files });
    }
    layers.reverse();
    let volume = Volume::new(layers).expect("a chain");
    let read = |range: &Range<u64>| {
        let len = range.end - range.start;
        let memory = Memory::new(len as usize);
        let window = Window { memory: &memory, volume: &volume, at: 0 };
        wait(volume.read(range.start, len, &window)).expect("the image is sound");
        memory.take().to_vec()
    };
    ranges.iter().map(read).collect()
}

/// A file whose operations are done when they are made.
#[derive(Debug)]
struct Bytes(RefCell<Vec<u8>>);

fn done<T: 'static>(value: T) -> Pending<'static, T> {
    Box::pin(std::future::ready(Ok::<T, Error>(value)))
}

impl FormatFile for Bytes {
    fn name(&self) -> &str {
        "bytes"
    }

    fn length(&self) -> u64 {
        self.0.borrow().len() as u64
    }

    fn is_device(&self) -> bool {
        false
    }

    fn is_writable(&self) -> bool {
        false
    }

    fn read(&self, offset: u64, len: usize) -> Pending<'static, Buf> {
        let (bytes, mut buf) = (self.0.borrow(), Buf::zeroed(len));
        let from = bytes.len().min(offset as usize);
        let stop = bytes.len().min(offset as usize + len);
        buf[..stop - from].copy_from_slice(&bytes[from..stop]);
        done(buf)
    }

    fn write(&self, _: u64, _: Buf) -> Pending<'static, ()> {
        unreachable!("it is only looked at")
    }

    fn flush(&self) -> Pending<'static, ()> {
        done(())
    }

    fn extend(&self, _: u64) -> Pending<'static, ()> {
        unreachable!("it is only looked at")
    }

    fn truncate(&self, _: u64) -> Pending<'static, ()> {
        unreachable!("it is only looked at")
    }

    fn zero(&self, _: Range<u64>) -> Pending<'static, ()> {
        unreachable!("it is only looked at")
    }
}
