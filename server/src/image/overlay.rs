//! What changes an image where it is: `coalesce`, `rebase`, `resize`.

use formats::tools::layers::{self, LayerFiles};
use serde_json::json;

use super::args::{CoalesceArgs, RebaseArgs, SizeChange};
use super::chain::{Chain, Gate, Opened};
use super::failure::Failure;
use super::file::Want;
use super::name::ImageName;
use super::progress::Bar;
use super::target::sync_folder;
use super::{engine, output};

/// `coalesce`.
///
/// # Errors
/// The overlay is as it was; its parent may have a part of it, which changes nothing for the overlay.
pub fn coalesce(args: &CoalesceArgs, gate: &Gate, json: bool) -> Result<u8, Failure> {
    let name = &args.image;
    // The overlay is only read, but nobody may write to it before its data has arrived: the lock of a reader does that. For
    // the parent to be given its name, it must be nobody else's at all.
    let want = if args.take_place { Want::Write } else { Want::Read };
    let chain = Chain::open_for(name, &[want, Want::Write], gate)?;
    let [child, parent, ..] = &chain.images[..] else {
        return Err(Failure::new(format!("{name} has no parent: there is nothing to coalesce it into")));
    };
    let child_size = child.description.size;
    refuse_snapshots(child, "coalesce it")?;
    if args.take_place {
        check_take_place(child, parent)?;
    }
    let (shape, below_size) = (chain.shape(), chain.below_size());
    let copied = engine::run(&chain.files(), move |files, budget| async move {
        let images = shape.take(&mut files.into_iter());
        // The one that is written last: from then on everything that may fail ends with a close.
        let child = layers::open_alone(&images[0], false, below_size, &budget).await?;
        let parent = layers::open(&images[1..], true, &budget).await?;
        let bar = Bar::new("coalesce");
        let copied = formats::tools::coalesce::coalesce(&child, &parent, &bar).await;
        let finished = layers::finish(&parent).await;
        copied.and_then(|copied| finished.map(|()| copied))
    })?;
    let (child, parent) = (&child.name, &parent.name);
    if args.take_place {
        std::fs::rename(&parent.path, &child.path)
            .map_err(|error| Failure::io(&child.path, "give it the parent's file", &error))?;
        sync_folder(child.folder())?;
    }
    let result = if args.take_place { child } else { parent };
    let text = format!(
        "{result}: has all that {child} had ({} written); the disk has {}\n",
        output::bytes(copied.data),
        output::bytes(child_size)
    );
    let value = json!({
        "image": child.to_string(),
        "parent": parent.to_string(),
        "result": result.to_string(),
        "data_bytes": copied.data,
    });
    output::print(json, &value, &text)?;
    Ok(0)
}

/// Refuses an image with snapshots inside: what they do not have themselves they read from the parent, which is about to be another one
/// or to hold other bytes.
fn refuse_snapshots(image: &Opened, doing: &str) -> Result<(), Failure> {
    let found = image.snapshots()?;
    let Some(first) = found.first() else { return Ok(()) };
    let name = &image.name;
    Err(Failure::new(format!(
        "{name} has {} snapshots inside ({:?} first), which would read other bytes from its parent afterwards: before you {doing}, delete \
         them (`blktapd image snapshot --internal delete NAME {name}`), or copy the whole with `blktapd image convert` instead",
        found.len(),
        if first.name.is_empty() { &first.id } else { &first.name },
    )))
}

fn check_take_place(child: &Opened, parent: &Opened) -> Result<(), Failure> {
    let (from, to) = (&parent.name, &child.name);
    let refuse = |why: &str| Err(Failure::new(format!("{from} cannot take the place of {to}: {why}")));
    if from.format.name() != to.format.name() {
        return refuse("it is of another type; coalesce without --take-place and use it by its own name");
    }
    if parent.files.len() + child.files.len() != 2
        || parent.files[0].is_device()
        || child.files[0].is_device()
    {
        return refuse("both have to be one regular file each");
    }
    let folder = |name: &ImageName| name.folder().canonicalize().ok();
    if folder(from) != folder(to) {
        return refuse("they are in different directories, so that paths in it would mean something else");
    }
    if parent.description.size > child.description.size {
        return refuse("its disk is larger, and would stay so");
    }
    Ok(())
}

/// `rebase`.
///
/// # Errors
/// The image is over its old parent still, or over the new one, whole; what the disk reads is the same.
pub fn rebase(args: &RebaseArgs, gate: &Gate, json: bool) -> Result<u8, Failure> {
    let name = &args.image;
    let below = args.parent.as_ref().map(|parent| Chain::open(parent, gate)).transpose()?;
    let link = below.as_ref().map(|below| below.top().link_from(name)).transpose()?;
    let format = name.format;
    let copied = if args.r#unsafe {
        let image = Opened::open(name, Want::Write, gate)?;
        check_circle(&image, below.as_ref())?;
        let file = image.files[0].blocking()?;
        futures_lite::future::block_on(format.set_backing(file, link))?;
        None
    } else {
        let chain = Chain::open_for(name, &[Want::Write], gate)?;
        check_circle(chain.top(), below.as_ref())?;
        refuse_snapshots(chain.top(), "rebase it")?;
        let (shape, below_shape) = (chain.shape(), below.as_ref().map(Chain::shape));
        let mut files = chain.files();
        files.extend(below.iter().flat_map(Chain::files));
        let copied = engine::run(&files, move |files, budget| async move {
            let mut files = files.into_iter();
            let images = shape.take(&mut files);
            let below = match below_shape {
                Some(shape) => Some(layers::open(&shape.take(&mut files), false, &budget).await?),
                None => None,
            };
            // The one that is written last: from then on everything that may fail ends with a close.
            let image = layers::open(&images, true, &budget).await?;
            let bar = Bar::new("rebase");
            let copied = formats::tools::rebase::rebase(&image, below.as_ref(), &bar).await;
            let finished = layers::finish(&image).await;
            let copied = copied.and_then(|copied| finished.map(|()| copied))?;
            let file = images[0].files[0].clone();
            format.set_backing(file, link).await?;
            Ok(copied)
        })?;
        Some(copied)
    };
    let parent = args.parent.as_ref().map(ToString::to_string);
    let over = parent.clone().unwrap_or_else(|| "nothing".to_owned());
    let copied_text = copied.map_or(String::new(), |copied| format!(", {} copied up", output::bytes(copied)));
    let value = json!({ "image": name.to_string(), "parent": parent, "copied_bytes": copied });
    output::print(json, &value, &format!("{name}: over {over}{copied_text}\n"))?;
    Ok(0)
}

fn check_circle(image: &Opened, below: Option<&Chain>) -> Result<(), Failure> {
    let files = below.map(Chain::files).unwrap_or_default();
    if files.iter().any(|file| image.files.iter().any(|own| own.key == file.key)) {
        return Err(Failure::new(format!("{} would be its own parent", image.name)));
    }
    Ok(())
}

/// `resize`.
///
/// # Errors
/// The image has its old size, or the new one, whole.
pub fn resize(
    name: &ImageName,
    change: SizeChange,
    shrink: bool,
    gate: &Gate,
    json: bool,
) -> Result<u8, Failure> {
    let chain = Chain::open_for(name, &[Want::Write], gate)?;
    let old = chain.top().description.size;
    let size = match change {
        SizeChange::To(size) => Some(size),
        SizeChange::Grow(by) => old.checked_add(by),
        SizeChange::Shrink(by) => old.checked_sub(by),
    };
    let size = size.filter(|size| *size > 0 && size.is_multiple_of(512)).ok_or_else(|| {
        Failure::usage(format!(
            "the new size must be a multiple of 512 and more than 0; it is {old} bytes now"
        ))
    })?;
    if size < old && !shrink {
        return Err(Failure::new(format!(
            "{name} has {old} bytes, and {size} are less: what is behind them would be lost; say --shrink if that is right"
        )));
    }
    let (shape, below_size) = (chain.shape(), chain.below_size());
    let new = engine::run(&chain.files(), move |files, budget| async move {
        let images: Vec<LayerFiles> = shape.take(&mut files.into_iter());
        if size < old {
            images[0].format.shrink(images[0].how(true, below_size, &budget), size).await?;
            return layers::open(&images, false, &budget).await.map(|volume| volume.size());
        }
        let volume = layers::open(&images, true, &budget).await?;
        let resized = volume.resize(size).await;
        let finished = layers::finish(&volume).await;
        resized.and(finished).map(|()| volume.size())
    })?;
    let value = json!({ "image": name.to_string(), "old_size": old, "size": new });
    output::print(json, &value, &format!("{name}: {}\n", output::bytes(new)))?;
    Ok(0)
}
