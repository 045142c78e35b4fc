//! Cylinders, heads and sectors, and which of the two sizes in a footer is the disk's.
//!
//! The footer holds a size in bytes and a geometry, and tools disagree which one counts. Virtual PC shows its guests the product
//! of the geometry, and QEMU, when it is not told otherwise, rounds the size up so that both agree. Everybody else (Hyper-V,
//! VirtualBox, XenServer, QEMU's `force_size`, Disk2vhd) means the size in bytes, and has a geometry that cannot express it.
//! Taking the wrong one cuts off the end of the disk or moves it, so the creator decides ([`disk_size`]).

use super::footer::{Footer, SECTOR};

/// A disk's geometry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Cylinders.
    pub cylinders: u16,
    /// Heads.
    pub heads: u8,
    /// Sectors per track.
    pub sectors_per_track: u8,
}

/// Sectors that a geometry can express at most: 65535 cylinders, 16 heads, 255 sectors. A disk that has it may be larger.
const SECTORS_MAX: u64 = 65535 * 16 * 255;

impl Geometry {
    /// The geometry for a size in bytes, rounded down, by the algorithm of the specification's appendix "CHS calculation".
    pub fn of_size(size: u64) -> Geometry {
        let sectors = size.div_ceil(SECTOR).clamp(1, SECTORS_MAX);
        if sectors >= 65535 * 16 * 63 {
            return Geometry::of_tracks(sectors / 255, 16, 255);
        }
        let tracks = sectors / 17;
        let heads = tracks.div_ceil(1024).max(4);
        if heads <= 16 && tracks < heads * 1024 {
            return Geometry::of_tracks(tracks, heads, 17);
        }
        let tracks = sectors / 31;
        if tracks < 16 * 1024 {
            return Geometry::of_tracks(tracks, 16, 31);
        }
        Geometry::of_tracks(sectors / 63, 16, 63)
    }

    fn of_tracks(tracks: u64, heads: u64, sectors_per_track: u8) -> Geometry {
        // At most 65535 by the limits above.
        Geometry { cylinders: (tracks / heads) as u16, heads: heads as u8, sectors_per_track }
    }

    /// Sectors that it addresses.
    pub fn sectors(self) -> u64 {
        u64::from(self.cylinders) * u64::from(self.heads) * u64::from(self.sectors_per_track)
    }

    /// The smallest size in bytes, from `size` on, that a geometry expresses exactly; larger ones than any can stay as they are.
    pub fn round_up(size: u64) -> u64 {
        let wanted = size.div_ceil(SECTOR);
        // A cylinder has at most 16 * 255 sectors, so one is found within a few of them.
        (wanted..wanted + 16 * 255 + 1)
            .map(|sectors| Geometry::of_size(sectors * SECTOR).sectors())
            .find(|sectors| *sectors >= wanted)
            .map_or(wanted * SECTOR, |sectors| sectors * SECTOR)
    }
}

/// Creators whose geometry is the disk's size: Virtual PC, Virtual Server, and QEMU in their manner.
const SIZED_BY_GEOMETRY: [[u8; 4]; 3] = [*b"vpc ", *b"vs  ", *b"qemu"];

/// Bytes of the disk: by the geometry for creators that mean it, else the current size. `room` is what the file can hold
/// (entries of the block table, or the length of a fixed disk): a geometry that does not fit is not believed.
pub fn disk_size(footer: &Footer, room: u64) -> u64 {
    let size = footer.current_size.get();
    let sectors = footer.geometry().sectors();
    let by_geometry = SIZED_BY_GEOMETRY.contains(&footer.creator_app)
        && (1..SECTORS_MAX).contains(&sectors)
        && sectors * SECTOR <= room;
    if by_geometry { sectors * SECTOR } else { size }
}

#[cfg(test)]
mod tests {
    //! Goal: the geometry is the one that other tools compute. Method: known answers (of the specification's algorithm, and
    //! as `qemu-img` writes them), limits, and what rounding up has to keep.

    use super::*;

    #[test]
    fn known_geometries() {
        for (size, cylinders, heads, sectors) in [
            (512, 0, 4, 17),
            (1 << 20, 30, 4, 17),
            (10 << 20, 301, 4, 17),
            (100 << 20, 1003, 12, 17),
            (1 << 30, 2080, 16, 63),
            (20 << 30, 41610, 16, 63),
            (127 << 30, 65278, 16, 255),
            (2040 << 30, 65535, 16, 255),
        ] {
            let expected = Geometry { cylinders, heads, sectors_per_track: sectors };
            assert_eq!(Geometry::of_size(size), expected, "{size}");
        }
    }

    #[test]
    fn rounding_up_gives_a_size_that_a_geometry_has() {
        for size in (1..3000u64).map(|step| step * step * 40_961 * 512) {
            let rounded = Geometry::round_up(size);
            assert!(rounded >= size, "{size}");
            let sectors = rounded / SECTOR;
            assert!(sectors > SECTORS_MAX || Geometry::of_size(rounded).sectors() == sectors, "{size}");
            assert!(rounded - size < 2 * 16 * 255 * 512, "{size}");
        }
    }
}
