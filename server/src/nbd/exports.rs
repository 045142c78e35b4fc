//! What a listener exports, from the daemon's table: looked up anew for each question, so that it is never stale.

use std::sync::Arc;

use ring_bridge::nbd::{BlockSizes, ExportInfo, Exports, Features, NoExport};
use shard::api::{Backend, FileKind};

use super::Scope;
use crate::daemon::disk::Standing;
use crate::daemon::{Daemon, Disk};

/// The exports of one listener.
pub struct DaemonExports<'a> {
    pub daemon: &'a Arc<Daemon>,
    pub scope: &'a Scope,
}

impl Exports for DaemonExports<'_> {
    fn find(&self, name: &str) -> Result<ExportInfo, NoExport> {
        let name = match self.scope {
            Scope::One(own) if name.is_empty() || name == &**own => own,
            Scope::One(_) => return Err(NoExport::Unknown),
            Scope::All => name,
        };
        let disk = self.daemon.find(name).filter(|disk| disk.inner().attachment.request.nbd);
        let disk = disk.ok_or(NoExport::Unknown)?;
        if self.daemon.is_stopping() {
            return Err(NoExport::ShuttingDown);
        }
        self.daemon.may_connect(&disk, 1).map_err(|problem| NoExport::Refused(problem.message))?;
        describe(&disk).ok_or(NoExport::Unknown)
    }

    fn list(&self) -> Vec<(String, String)> {
        let disks = match self.scope {
            Scope::One(name) => self.daemon.find(name).into_iter().collect(),
            Scope::All => self.daemon.all_disks(),
        };
        let serves =
            |disk: &&Arc<Disk>| disk.standing() == Standing::Live && disk.inner().attachment.request.nbd;
        disks.iter().filter(serves).map(|disk| (disk.name.to_string(), String::new())).collect()
    }
}

/// A live disk as NBD clients see it.
fn describe(disk: &Disk) -> Option<ExportInfo> {
    let inner = disk.inner();
    let image = &inner.live.as_ref()?.image;
    // A device without discard would answer every TRIM with an error.
    let trim = match &image.backend {
        Backend::File(file) => !matches!(file.kind, FileKind::Block { discard: false }),
        Backend::Ram(_) | Backend::Null | Backend::Image(_) => true,
    };
    let default = BlockSizes::default();
    Some(ExportInfo {
        name: disk.name.to_string(),
        description: String::new(),
        size_bytes: image.size_bytes,
        read_only: inner.attachment.request.read_only,
        features: Features { trim, ..Features::ALL },
        block_sizes: BlockSizes {
            minimum: image.block_bytes,
            preferred: default.preferred.max(image.block_bytes),
            maximum: default.maximum,
        },
    })
}
