//! Serves one file, RAM disk or null disk on a Unix socket from one shard, without the control side: for profiling a shard alone.
//!
//! `cargo run --release -p shard --example serve -- SOCKET (FILE | ram:SIZE | null:SIZE) [CPU]`

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use ring_bridge::nbd::{BlockSizes, ExportInfo, Features, Handoff, Negotiation, OneExport, Step, TlsMode};
use shard::api::{
    Backend, CacheMode, Command, DiskConfig, DiskId, Envelope, ErrorPolicy, FileKind, ImageFile,
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
    let file = std::fs::OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(what)?;
    let length = file.metadata()?.len();
    let image = ImageFile {
        fd: file.into(),
        tail: None,
        offset_align: 512,
        memory_align: 512,
        cache: CacheMode::None,
        kind: FileKind::Regular,
        length,
        punts: false,
        store: 1,
    };
    Ok((Backend::File(Arc::new(image)), length))
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
    shard.send(Envelope { tag: 0, command: Command::AddDisk(Box::new(config)) })?;
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
            shard.send(Envelope { tag: 1, command })?;
        }
    }
    Ok(())
}
