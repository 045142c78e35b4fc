//! What the backend tells a frontend: what it can do before the frontend chooses its rings, and what the disk is like when they are
//! connected.
//!
//! Source: `xen/include/public/io/blkif.h`. `sectors` counts 512 bytes always, whatever the sector size.

/// What a backend can do with rings, before it knows the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Features {
    /// The largest ring: 2 to this power pages.
    pub max_ring_page_order: u32,
    /// Queues of one device.
    pub max_queues: u32,
    /// Segments of one indirect request.
    pub max_indirect_segments: u32,
    /// The backend can keep grants mapped.
    pub persistent: bool,
}

impl Default for Features {
    fn default() -> Features {
        Features {
            max_ring_page_order: super::keys::RING_PAGE_ORDER_MAX,
            max_queues: super::keys::QUEUES_MAX,
            max_indirect_segments: 256,
            persistent: true,
        }
    }
}

/// Discard, as the disk can do it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Discard {
    /// Bytes.
    pub granularity: u32,
    /// Bytes from the start of the disk to the first boundary.
    pub alignment: u32,
    /// Discarded data can be made unrecoverable.
    pub secure: bool,
}

/// What a disk is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Properties {
    /// Size in sectors of 512 bytes.
    pub sectors: u64,
    /// Bytes of a logical block: 512 or 4096.
    pub sector_size: u32,
    /// Bytes of a physical block.
    pub physical_sector_size: u32,
    /// Writes are refused.
    pub read_only: bool,
    /// The guest shall see a CD drive.
    pub cdrom: bool,
    /// The guest shall see a removable disk.
    pub removable: bool,
    /// `FLUSH_DISKCACHE` is understood.
    pub flush: bool,
    /// `WRITE_BARRIER` is understood.
    pub barrier: bool,
    /// `DISCARD` is understood.
    pub discard: Option<Discard>,
}

/// Names and values.
pub type Pairs = Vec<(&'static str, String)>;

/// To be published before the state becomes InitWait.
pub fn features(features: &Features) -> Pairs {
    vec![
        ("max-ring-page-order", features.max_ring_page_order.to_string()),
        // The deprecated twin, for frontends of Citrix and of Red Hat on EC2.
        ("max-ring-pages", (1u32 << features.max_ring_page_order).to_string()),
        ("multi-queue-max-queues", features.max_queues.to_string()),
        ("feature-max-indirect-segments", features.max_indirect_segments.to_string()),
        ("feature-persistent", u32::from(features.persistent).to_string()),
    ]
}

/// To be published with the state Connected, in the same transaction; and before InitWait where the disk is known by then.
pub fn properties(disk: &Properties) -> Pairs {
    // CD-ROM, removable, read-only.
    let info = u32::from(disk.cdrom) | u32::from(disk.removable) << 1 | u32::from(disk.read_only) << 2;
    let mut pairs = vec![
        ("sectors", disk.sectors.to_string()),
        ("sector-size", disk.sector_size.to_string()),
        ("physical-sector-size", disk.physical_sector_size.to_string()),
        ("info", info.to_string()),
        ("feature-flush-cache", u32::from(disk.flush).to_string()),
        ("feature-barrier", u32::from(disk.barrier).to_string()),
        ("feature-discard", u32::from(disk.discard.is_some()).to_string()),
    ];
    if let Some(discard) = &disk.discard {
        // Frontends take neither of the first two without the other.
        pairs.extend([
            ("discard-granularity", discard.granularity.to_string()),
            ("discard-alignment", discard.alignment.to_string()),
            ("discard-secure", u32::from(discard.secure).to_string()),
        ]);
    }
    pairs
}

#[cfg(test)]
mod tests {
    //! Goal: the values that frontends read. Method: compare with the header's words by hand.

    use super::*;

    #[test]
    fn info_is_a_bitmap_and_discard_comes_whole() {
        let mut disk = Properties {
            sectors: 8,
            sector_size: 4096,
            physical_sector_size: 4096,
            read_only: true,
            cdrom: false,
            removable: false,
            flush: true,
            barrier: true,
            discard: None,
        };
        let get = |pairs: &Pairs, key: &str| {
            pairs.iter().find(|(name, _)| *name == key).map(|(_, value)| value.clone())
        };
        let pairs = properties(&disk);
        assert_eq!(get(&pairs, "info").unwrap(), "4");
        assert_eq!(get(&pairs, "sectors").unwrap(), "8", "512 bytes each, although a block has 4096");
        assert_eq!(get(&pairs, "feature-discard").unwrap(), "0");
        assert_eq!(get(&pairs, "discard-granularity"), None);
        disk.cdrom = true;
        disk.removable = true;
        disk.discard = Some(Discard { granularity: 4096, alignment: 0, secure: false });
        let pairs = properties(&disk);
        assert_eq!(get(&pairs, "info").unwrap(), "7");
        assert!(get(&pairs, "discard-granularity").is_some() && get(&pairs, "discard-alignment").is_some());
        let pairs = features(&Features::default());
        assert_eq!(get(&pairs, "max-ring-page-order").unwrap(), "4");
        assert_eq!(get(&pairs, "max-ring-pages").unwrap(), "16");
    }
}
