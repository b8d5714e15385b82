//! Reads system files below a root folder: `/`, or in a test a folder in its place. All paths are those of the system
//! (`/etc/ppp/peers`). A symbolic link with an absolute target leads below the root folder, too.

use std::ffi::OsString;
use std::fs::{self, Metadata, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};

use nix::fcntl::OFlag;

/// As many symbolic links as the kernel follows in one path (`MAXSYMLINKS`, linux/namei.h).
const MAX_LINKS: usize = 40;

#[derive(Clone, Debug)]
pub struct Root {
    folder: PathBuf,
    /// The user that system files belong to.
    pub owner: u32,
}

impl Root {
    /// The system's root folder.
    pub fn system() -> Self {
        Self {
            folder: "/".into(),
            owner: 0,
        }
    }

    /// A folder in the place of `/`. Its owner is taken for root.
    pub fn at(folder: &Path) -> Self {
        Self {
            folder: folder.to_owned(),
            owner: fs::metadata(folder).map_or(0, |metadata| metadata.uid()),
        }
    }

    /// The path with all symbolic links resolved. None if there is no such file.
    pub fn canonical(&self, path: impl AsRef<Path>) -> Option<PathBuf> {
        let mut rest = names(path.as_ref());
        let mut path = PathBuf::from("/");
        let mut links = 0;
        while let Some(name) = rest.pop() {
            if name == "/" {
                path = "/".into();
            } else if name == ".." {
                path.pop();
            } else if let Ok(target) = fs::read_link(self.place(&path.join(&name))) {
                links += 1;
                if links > MAX_LINKS {
                    return None;
                }
                rest.extend(names(&target));
            } else {
                path.push(name);
            }
        }
        self.place(&path).exists().then_some(path)
    }

    /// The path for this process's own system calls, which follows symbolic links below the root folder. None if there is no
    /// such file there.
    pub fn reach(&self, path: impl AsRef<Path>) -> Option<PathBuf> {
        if self.folder == Path::new("/") {
            // The kernel follows the links itself.
            return Some(path.as_ref().to_owned());
        }
        Some(self.place(&self.canonical(path)?))
    }

    /// The path for this process's own system calls, with symbolic links left as they are: they must not lead out of the
    /// root folder.
    pub fn place(&self, path: &Path) -> PathBuf {
        self.folder.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// The metadata of the file, after symbolic links. None if there is no such file.
    pub fn metadata(&self, path: impl AsRef<Path>) -> Option<Metadata> {
        fs::metadata(self.reach(path)?).ok()
    }

    /// Whether there is such a file, after symbolic links.
    pub fn exists(&self, path: impl AsRef<Path>) -> bool {
        self.metadata(path).is_some()
    }

    /// Whether the path itself is a symbolic link, dangling or not.
    pub fn is_symlink(&self, path: &str) -> bool {
        self.place(Path::new(path)).is_symlink()
    }

    /// The text of a regular file. None if there is no such file, or it can't be read.
    pub fn read(&self, path: impl AsRef<Path>) -> Option<String> {
        // Without O_NONBLOCK opening a fifo would wait for a writer (fifo(7)).
        let flags = OFlag::O_NONBLOCK.bits();
        let options = OpenOptions::new().read(true).custom_flags(flags).clone();
        let mut file = options.open(self.reach(path)?).ok()?;
        if !file.metadata().ok()?.is_file() {
            return None;
        }
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).ok()?;
        Some(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The paths of a folder's entries, sorted. Empty if there is no such folder.
    pub fn list(&self, folder: impl AsRef<Path>) -> Vec<PathBuf> {
        let folder = folder.as_ref();
        let place = self.reach(folder);
        let entries = place.and_then(|place| fs::read_dir(place).ok());
        let names = entries.into_iter().flatten().flatten();
        let mut paths: Vec<_> = names.map(|entry| folder.join(entry.file_name())).collect();
        paths.sort();
        paths
    }

    /// The value of the parameter at this path in /proc/sys. None if the kernel has no such parameter.
    pub fn sysctl(&self, path: &str) -> Option<String> {
        let value = self.read(Path::new("/proc/sys").join(path))?;
        Some(value.trim().to_owned())
    }
}

/// The components of a path in reverse order, `/` and `..` among them.
fn names(path: &Path) -> Vec<OsString> {
    let names = path.components().filter_map(|component| match component {
        Component::RootDir => Some("/".into()),
        Component::ParentDir => Some("..".into()),
        Component::Normal(name) => Some(name.to_owned()),
        Component::CurDir | Component::Prefix(_) => None,
    });
    names.rev().collect()
}
