//! Serves one file, RAM disk or null disk on a Unix socket from one shard, without the control side: for profiling a shard alone.
//!
//! `cargo run --release -p shard --example serve -- SOCKET (FILE | ram:SIZE | null:SIZE | chain:TYPE:PATH[,TYPE:PATH]…) [CPU]`
//!
//! A chain is named from its top image on; who names it answers for the images belonging together.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use ring_bridge::nbd::{BlockSizes, ExportInfo, Features, Handoff, Negotiation, OneExport, Step, TlsMode};
use shard::api::{
    Backend, CacheMode, ChainLayer, Command, DiskConfig, DiskId, Envelope, ErrorPolicy, FileKind, ImageChain,
    ImageFile,
};
use shard::executor::{RingFlavour, ShardOptions, event_channel, start};
use shard::ram::{PageSize, RamBudget, RamDisk, anonymous_backing};

type Failure = Box<dyn std::error::Error>;

fn backend(what: &str) -> Result<(Backend, u64), Failure> {
    if let Some(size) = what.strip_prefix("null:") {
        return Ok((Backend::Null, size.parse()?));
    }
    if let Some(size) = what.strip_prefix("ram:") {
        let size: u64 = size.parse()?;
        let budget = Arc::new(RamBudget::new(u64::MAX));
        let file = anonymous_backing("ram", size, PageSize::Base)?;
        return Ok((Backend::Ram(RamDisk::create(file, "ram", size, PageSize::Base, budget)?), size));
    }
    if let Some(chain) = what.strip_prefix("chain:") {
        return open_chain(chain);
    }
    let image = open_file(what)?;
    let length = image.length;
    Ok((Backend::File(image), length))
}

fn open_chain(chain: &str) -> Result<(Backend, u64), Failure> {
    let mut layers = Vec::new();
    let mut size = None;
    for (index, image) in chain.split(',').enumerate() {
        let (name, path) = image.split_once(':').ok_or("TYPE:PATH")?;
        let format = formats::registry::format(name).ok_or("no such type")?;
        let description =
            block_on(format.describe(formats::blocking::Blocking::open(path.as_ref(), false)?))?;
        size.get_or_insert(description.size);
        layers.push(ChainLayer {
            format,
            files: vec![open_file(path)?],
            names: vec![path.into()],
            writable: index == 0,
            flush: false,
            snapshot: None,
            log: None,
            key: None,
        });
    }
    Ok((Backend::Image(Arc::new(ImageChain { layers })), size.unwrap_or_default()))
}

/// Polls a future that never waits.
fn block_on<T>(future: impl Future<Output = T>) -> T {
    let mut future = std::pin::pin!(future);
    loop {
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        if let std::task::Poll::Ready(value) = future.as_mut().poll(&mut context) {
            return value;
        }
    }
}

fn open_file(path: &str) -> Result<Arc<ImageFile>, Failure> {
    let file = std::fs::OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(path)?;
    let length = file.metadata()?.len();
    Ok(Arc::new(ImageFile {
        fd: file.into(),
        tail: None,
        offset_align: 512,
        memory_align: 512,
        cache: CacheMode::None,
        kind: FileKind::Regular,
        length,
        length_now: length.into(),
        punts: false,
        store: 1,
    }))
}

fn negotiate(mut stream: UnixStream, export: &OneExport) -> Result<Option<Handoff>, Failure> {
    let mut negotiation = Negotiation::new(TlsMode::Off);
    loop {
        let step = negotiation.advance(export);
        stream.write_all(&negotiation.take_output())?;
        match step {
            Step::Again => {}
            Step::NeedInput => {
                let mut bytes = [0; 4096];
                let n = stream.read(&mut bytes)?;
                if n == 0 {
                    return Ok(None);
                }
                negotiation.feed(&bytes[..n]);
            }
            Step::Transmission(agreed) => {
                return Ok(Some(Handoff {
                    fd: OwnedFd::from(stream),
                    unread: agreed.unread,
                    transmission: agreed.transmission,
                    tls: None,
                    peer: "example".into(),
                }));
            }
            _ => return Ok(None),
        }
    }
}

fn main() -> Result<(), Failure> {
    let args: Vec<String> = std::env::args().collect();
    let [_, socket, what, rest @ ..] = &args[..] else { return Err("usage: serve SOCKET WHAT [CPU]".into()) };
    let (backend, size_bytes) = backend(what)?;
    let (events, receiver) = event_channel()?;
    let options = ShardOptions {
        index: 0,
        cpu: rest.first().map(|cpu| cpu.parse()).transpose()?,
        ring: RingFlavour::Deferred,
        buffer_budget_bytes: 64 << 20,
        table_budget_bytes: 32 << 20,
        fault_commands: false,
    };
    let shard = start(options, events)?;
    let disk = DiskId(1);
    let config = DiskConfig {
        id: disk,
        name: "disk".into(),
        backend,
        size_bytes,
        read_only: false,
        on_error: ErrorPolicy::Report,
        on_enospc: ErrorPolicy::Report,
        limits: Default::default(),
        groups: Vec::new(),
        counters: Default::default(),
    };
    shard.send(Envelope { tag: 0, command: Command::AddDisk(Box::new(config)) });
    std::thread::spawn(move || {
        while let Ok((_, event)) = receiver.rx.recv() {
            eprintln!("{event:?}");
        }
    });
    let export = OneExport(ExportInfo {
        name: "disk".into(),
        description: String::new(),
        size_bytes,
        read_only: false,
        features: Features::ALL,
        block_sizes: BlockSizes::default(),
    });
    let _ = std::fs::remove_file(socket);
    let listener = UnixListener::bind(socket)?;
    for stream in listener.incoming() {
        if let Some(handoff) = negotiate(stream?, &export)? {
            let command = Command::Connect { disk, handoff: Box::new(handoff) };
            shard.send(Envelope { tag: 1, command });
        }
    }
    Ok(())
}
