//! `convert` and `dd`.

use std::ops::Range;

use formats::driver::Create;
use formats::tools::copy::{Target, copy};
use formats::tools::encode::copy_encoded;
use formats::tools::layers;
use formats::tools::walk::Depth;
use serde_json::json;

use super::args::{ConvertArgs, DdArgs};
use super::chain::{Chain, Gate};
use super::failure::Failure;
use super::file::{OpenFile, Want};
use super::make::{NewImage, key_of_new, make};
use super::name::ImageName;
use super::progress::Bar;
use super::threads::AllCores;
use super::{engine, output};

/// Where a copy goes.
enum Goal {
    /// An image that is to be made.
    New(Box<Create>, NewImage),
    /// One that exists.
    Used(Chain),
}

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    /// `convert`.
    Plain,
    /// `convert -c`.
    Encoded,
    /// `dd`.
    Part,
}

impl Goal {
    /// An existing image, to be written.
    fn used(name: &ImageName, gate: &Gate) -> Result<Goal, Failure> {
        Ok(Goal::Used(Chain::open_for(name, &[Want::Write], gate)?))
    }

    fn files(&self) -> Vec<&OpenFile> {
        match self {
            Goal::New(_, image) => image.files(),
            Goal::Used(chain) => chain.files(),
        }
    }
}

/// `convert`.
///
/// # Errors
/// The target is not there then, or, written in place, holds a part of the source.
pub fn convert(args: &ConvertArgs, gate: &Gate, json: bool) -> Result<u8, Failure> {
    let source = Chain::open(&args.source, gate)?;
    let size = source.top().disk_size()?;
    // A device is the raw image that it always was.
    let raw_device = args.target.format.name() == "raw" && is_device(&args.target);
    let goal = match args.in_place || raw_device {
        true => Goal::used(&args.target, gate)?,
        false => {
            let key = key_of_new(&args.target)?;
            let create = Create { size: Some(size), backing: None, options: args.new.options.clone(), key };
            let image = NewImage::make(&args.target, &create, args.new.force, gate)?;
            Goal::New(Box::new(create), image)
        }
    };
    if let Goal::Used(chain) = &goal
        && chain.top().description.size < size
    {
        return Err(Failure::new(format!(
            "{} has {} bytes and the contents of {} {size}: make it larger first",
            args.target,
            chain.top().description.size,
            args.source
        )));
    }
    let how = if args.compress { How::Encoded } else { How::Plain };
    run(&args.source, &args.target, source, 0..size, goal, 0, how, json)
}

/// `dd`.
///
/// # Errors
/// As for [`convert`].
pub fn dd(args: &DdArgs, gate: &Gate, json: bool) -> Result<u8, Failure> {
    if args.bs == 0 || !args.bs.is_multiple_of(512) {
        return Err(Failure::usage(format!("--bs {}: blocks have a multiple of 512 bytes", args.bs)));
    }
    let bytes = |blocks: u64, what: &str| {
        blocks.checked_mul(args.bs).ok_or_else(|| Failure::usage(format!("--{what} {blocks}: too many")))
    };
    let (skip, to) = (bytes(args.skip, "skip")?, bytes(args.seek, "seek")?);
    let source = Chain::open(&args.source, gate)?;
    let size = source.top().disk_size()?;
    if skip > size {
        return Err(Failure::new(format!(
            "--skip: {skip} bytes are more than the {size} of {}",
            args.source
        )));
    }
    let len = match args.count {
        Some(count) => bytes(count, "count")?.min(size - skip),
        None => size - skip,
    };
    let goal = match args.target.path.exists() {
        true => Goal::used(&args.target, gate)?,
        false => {
            let end = to.checked_add(len).ok_or_else(|| Failure::usage("--seek: too many"))?;
            let key = key_of_new(&args.target)?;
            let create = Create { size: Some(end), backing: None, options: Vec::new(), key };
            let image = NewImage::make(&args.target, &create, false, gate)?;
            Goal::New(Box::new(create), image)
        }
    };
    run(&args.source, &args.target, source, skip..skip + len, goal, to, How::Part, json)
}

fn is_device(name: &ImageName) -> bool {
    OpenFile::open(&name.path, Want::Look).is_ok_and(|file| file.is_device())
}

#[expect(clippy::too_many_arguments)] // both commands end here
fn run(
    source_name: &ImageName,
    target_name: &ImageName,
    source: Chain,
    range: Range<u64>,
    goal: Goal,
    to: u64,
    how: How,
    json: bool,
) -> Result<u8, Failure> {
    let shape = source.shape();
    let mut files = source.files();
    files.extend(goal.files());
    let format = target_name.format;
    let made = match &goal {
        Goal::New(create, _) => Err(create.clone()),
        Goal::Used(chain) => Ok(chain.shape()),
    };
    let copied = engine::run(&files, move |files, budget| async move {
        let mut files = files.into_iter();
        let source = layers::open(&shape.take(&mut files), false, &budget).await?;
        let (images, kind) = match made {
            Ok(shape) => (shape.take(&mut files), Target::Used),
            Err(create) => {
                let files: Vec<_> = files.collect();
                let kind = if format.starts_zero(&create) { Target::New } else { Target::Used };
                (vec![make(format, &files, &create).await?], kind)
            }
        };
        let target = layers::open(&images, true, &budget).await?;
        let bar = Bar::new(if how == How::Part { "dd" } else { "convert" });
        let copied = match how {
            How::Encoded => copy_encoded(&source, &target, &AllCores, &bar).await,
            How::Plain | How::Part => copy((&source, Depth::Chain), range, (&target, kind), to, &bar).await,
        };
        // Also after an error: what an existing image was given is sound.
        let finished = layers::finish(&target).await;
        copied.and_then(|copied| finished.map(|()| copied))
    })?;
    if let Goal::New(_, image) = goal {
        image.publish()?;
    }
    let text = format!(
        "{target_name}: {} copied from {source_name}, {} are zero\n",
        output::bytes(copied.data),
        output::bytes(copied.zero)
    );
    let value = json!({
        "source": source_name.to_string(),
        "target": target_name.to_string(),
        "data_bytes": copied.data,
        "zero_bytes": copied.zero,
    });
    output::print(json, &value, &text)?;
    Ok(0)
}
