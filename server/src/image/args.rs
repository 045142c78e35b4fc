//! The command line of `blktapd image`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::name::ImageName;

/// How all commands end, for the manual.
const CODES: &str = "Exit codes: 0 done; 1 failed; 64 wrong usage. check: 0 clean, 1 could not check, 2 corrupt, 3 only leaks. \
compare: 0 the same, 1 different, 2 could not compare.\n\nAn image is named TYPE:PATH, like vhd:/srv/a.vhd. A comma, a percent sign \
and a question mark in the path are written %2C, %25 and %3F. Options: ?snapshot=NAME reads a snapshot inside the image, \
?cache=writeback goes through the page cache.\n\nAn image in use by the daemon, QEMU or another command is refused. New files get \
their name when they are complete and durable: an interrupted command leaves none.";

/// Options of `image`.
#[derive(Debug, Args)]
#[command(after_help = CODES)]
pub struct ImageArgs {
    /// Print JSON
    #[arg(long, global = true)]
    pub json: bool,
    /// A block device that images may name as their parent; may be repeated
    #[arg(long, global = true, value_name = "DEVICE")]
    pub allow_device: Vec<PathBuf>,
    /// Run directory of the daemon: if it died, that may hold acknowledged writes to an image, which is refused then
    #[arg(long, global = true, value_name = "DIR", default_value = "/run/blktapd")]
    pub run_dir: PathBuf,
    /// What to do
    #[command(subcommand)]
    pub command: ImageCommand,
}

/// Commands of `image`.
#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// Make an empty image
    Create(CreateArgs),
    /// Show what an image says of itself
    Info {
        /// The image
        #[arg(value_name = "TYPE:PATH")]
        image: ImageName,
        /// Show its parents, too
        #[arg(long)]
        chain: bool,
        /// Look even if somebody writes to it; what is shown may be out of date
        #[arg(long, short = 'U')]
        force_share: bool,
    },
    /// Find what is wrong with an image; changes nothing
    Check {
        /// The image
        #[arg(value_name = "TYPE:PATH")]
        image: ImageName,
    },
    /// Repair an image
    Repair {
        /// The image
        #[arg(value_name = "TYPE:PATH")]
        image: ImageName,
        /// Only give back space that nothing refers to
        #[arg(long)]
        leaks: bool,
    },
    /// Copy the contents of an image into a new one of any type
    Convert(ConvertArgs),
    /// Put an overlay over an image, or work on the snapshots inside one
    Snapshot(SnapshotArgs),
    /// Put what an overlay has into its parent
    Coalesce(CoalesceArgs),
    /// Give an overlay another parent
    Rebase(RebaseArgs),
    /// Change the size of the disk
    Resize {
        /// The image
        #[arg(value_name = "TYPE:PATH")]
        image: ImageName,
        /// The new size, like 20G; +SIZE and -SIZE change it by so much
        #[arg(value_name = "SIZE", allow_hyphen_values = true)]
        size: SizeChange,
        /// Allow a smaller size: what is behind it is lost
        #[arg(long)]
        shrink: bool,
    },
    /// Show where the bytes of the disk are
    Map {
        /// The image
        #[arg(value_name = "TYPE:PATH")]
        image: ImageName,
        /// First byte
        #[arg(long, value_name = "SIZE", default_value = "0", value_parser = formats::size::parse_size)]
        start: u64,
        /// Bytes [default: all]
        #[arg(long, value_name = "SIZE", value_parser = formats::size::parse_size)]
        length: Option<u64>,
    },
    /// Compare the contents of two images
    Compare {
        /// One image
        #[arg(value_name = "TYPE:PATH")]
        one: ImageName,
        /// The other
        #[arg(value_name = "TYPE:PATH")]
        two: ImageName,
        /// Different sizes are a difference, also if what is behind the smaller one is zero
        #[arg(long)]
        strict: bool,
    },
    /// Tell how large a file would be
    Measure(MeasureArgs),
    /// Copy a part of an image into a new one, or over a part of one that exists
    Dd(DdArgs),
}

/// Options of the format, and of all commands that make an image.
#[derive(Debug, Default, Args)]
pub struct NewArgs {
    /// An option of the format, like cluster_size=1M; may be repeated
    #[arg(short = 'o', long = "option", value_name = "NAME=VALUE", value_parser = option)]
    pub options: Vec<(String, String)>,
    /// Replace the file if it exists (it is replaced as a whole, when the new one is complete)
    #[arg(long)]
    pub force: bool,
}

/// Options of `create`.
#[derive(Debug, Args)]
pub struct CreateArgs {
    /// The new image
    #[arg(value_name = "TYPE:PATH")]
    pub image: ImageName,
    /// Size of the disk, like 20G [default: that of the parent]
    #[arg(value_name = "SIZE", value_parser = formats::size::parse_size)]
    pub size: Option<u64>,
    /// The image below
    #[arg(long, value_name = "TYPE:PATH")]
    pub parent: Option<ImageName>,
    /// How
    #[command(flatten)]
    pub new: NewArgs,
}

/// Options of `convert`.
#[derive(Debug, Args)]
pub struct ConvertArgs {
    /// What to copy
    #[arg(value_name = "TYPE:PATH")]
    pub source: ImageName,
    /// The new image, or a block device
    #[arg(value_name = "TYPE:PATH")]
    pub target: ImageName,
    /// Write into an image that exists and is large enough; can be run again when it was interrupted
    #[arg(long, conflicts_with_all = ["force", "options"])]
    pub in_place: bool,
    /// Compress, on all cores; for how see the options of the format, like compression_type=zstd of qcow2
    #[arg(short = 'c', long, conflicts_with = "in_place")]
    pub compress: bool,
    /// How
    #[command(flatten)]
    pub new: NewArgs,
}

/// Options of `snapshot`.
#[derive(Debug, Args)]
pub struct SnapshotArgs {
    /// Work on the snapshots inside an image instead: list IMAGE, create NAME IMAGE, apply NAME IMAGE, delete NAME IMAGE
    #[arg(long, value_name = "ACTION", conflicts_with_all = ["raw_parent", "size", "depth_limit", "empty", "options", "force"])]
    pub internal: Option<Internal>,
    /// The image to put an overlay over (TYPE:PATH), or the name of a snapshot, or the image whose snapshots to list
    #[arg(value_name = "PARENT|NAME|IMAGE")]
    pub first: String,
    /// The overlay to make, or the image with the snapshots (TYPE:PATH)
    #[arg(value_name = "NEW|IMAGE")]
    pub second: Option<String>,
    /// PARENT is the plain path of a raw image
    #[arg(short = 'm', long = "raw-parent")]
    pub raw_parent: bool,
    /// Size of the disk [default: that of the parent]
    #[arg(long, short = 'S', value_name = "SIZE", value_parser = formats::size::parse_size)]
    pub size: Option<u64>,
    /// Images that the chain may have afterwards, at most
    #[arg(long, short = 'l', value_name = "N", default_value_t = formats::volume::DEPTH_MAX as u32,
          value_parser = clap::value_parser!(u32).range(1..=formats::volume::DEPTH_MAX as i64))]
    pub depth_limit: u32,
    /// Put the overlay over PARENT also if that has nothing of its own; without this, over the next one below that has
    #[arg(long, short = 'e')]
    pub empty: bool,
    /// How
    #[command(flatten)]
    pub new: NewArgs,
}

/// Work on snapshots inside an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Internal {
    /// Show them
    List,
    /// Keep the present state
    Create,
    /// Go back to one; the present state is lost
    Apply,
    /// Forget one
    Delete,
}

/// Options of `coalesce`.
#[derive(Debug, Args)]
#[command(
    long_about = "Put what an overlay has into its parent. The overlay is not changed, so the disk reads the same through it, \
also when this was interrupted, and the same command can be run again. Other overlays over the same parent are lost. With \
--take-place the parent's file gets the overlay's name in the end."
)]
pub struct CoalesceArgs {
    /// The overlay
    #[arg(value_name = "TYPE:PATH")]
    pub image: ImageName,
    /// Rename the parent's file to the overlay's when all is in it (same type, same directory)
    #[arg(long)]
    pub take_place: bool,
}

/// Options of `rebase`.
#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("below").required(true).args(["parent", "no_parent"])))]
pub struct RebaseArgs {
    /// The overlay
    #[arg(value_name = "TYPE:PATH")]
    pub image: ImageName,
    /// Its new parent
    #[arg(long, value_name = "TYPE:PATH")]
    pub parent: Option<ImageName>,
    /// None: everything is copied up
    #[arg(long)]
    pub no_parent: bool,
    /// Only change the reference, without a look at the old parent: for a parent that was moved or renamed
    #[arg(long)]
    pub r#unsafe: bool,
}

/// Options of `measure`.
#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("what").required(true).args(["source", "size"])))]
pub struct MeasureArgs {
    /// What would be converted
    #[arg(value_name = "TYPE:PATH")]
    pub source: Option<ImageName>,
    /// An empty disk of this size instead
    #[arg(long, value_name = "SIZE", value_parser = formats::size::parse_size)]
    pub size: Option<u64>,
    /// Type of the new image
    #[arg(long, value_name = "TYPE")]
    pub to: String,
    /// An option of the format, like cluster_size=1M; may be repeated
    #[arg(short = 'o', long = "option", value_name = "NAME=VALUE", value_parser = option)]
    pub options: Vec<(String, String)>,
}

/// Options of `dd`.
#[derive(Debug, Args)]
pub struct DdArgs {
    /// What to copy
    #[arg(value_name = "TYPE:PATH")]
    pub source: ImageName,
    /// Where to: an image that exists is written in place and keeps its size, else one is made
    #[arg(value_name = "TYPE:PATH")]
    pub target: ImageName,
    /// Bytes of a block, a multiple of 512
    #[arg(long, value_name = "SIZE", default_value = "512", value_parser = formats::size::parse_size)]
    pub bs: u64,
    /// Blocks to copy [default: up to the end]
    #[arg(long, value_name = "N", value_parser = formats::size::parse_count)]
    pub count: Option<u64>,
    /// Blocks of the source to pass over
    #[arg(long, value_name = "N", default_value = "0", value_parser = formats::size::parse_count)]
    pub skip: u64,
    /// Blocks of the target to pass over
    #[arg(long, value_name = "N", default_value = "0", value_parser = formats::size::parse_count)]
    pub seek: u64,
}

/// A new size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SizeChange {
    /// So many bytes.
    To(u64),
    /// More by this.
    Grow(u64),
    /// Less by this.
    Shrink(u64),
}

impl std::str::FromStr for SizeChange {
    type Err = formats::size::SizeError;

    fn from_str(text: &str) -> Result<SizeChange, Self::Err> {
        let (change, rest): (fn(u64) -> SizeChange, _) = match text.as_bytes() {
            [b'+', ..] => (SizeChange::Grow, &text[1..]),
            [b'-', ..] => (SizeChange::Shrink, &text[1..]),
            _ => (SizeChange::To, text),
        };
        formats::size::parse_size(rest).map(change)
    }
}

fn option(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err(format!("{text:?} is no option: write NAME=VALUE")),
    }
}
