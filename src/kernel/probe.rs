//! Asks a server for one TCP connection, as any client of the LAN may, and leaves no trace of it in the table of connections.

use std::net::{SocketAddrV4, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::libc::linger;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::sockopt::{Linger, SocketError};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrIn, bind, connect, getsockopt, setsockopt, socket,
};

use crate::kernel::conntrack::{self, Filter};

/// How long a server may take. One of the LAN takes less than a millisecond.
const LIMIT: Duration = Duration::from_secs(1);

/// What a server says to a request for a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    Accepts,
    /// With a reset, or an ICMP error: nothing listens, or a firewall rejects.
    Refuses,
    /// Nothing came in time.
    Silent,
}

/// Asks for a TCP connection and ends it at once, by a reset, after which the server sends nothing more.
/// Errors: the request can't be sent, for instance because this router's own firewall drops it.
pub fn ask(server: SocketAddrV4) -> Result<Answer> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let fd = socket(AddressFamily::Inet, SockType::Stream, flags, None).context("make a socket")?;
    setsockopt(
        &fd,
        Linger,
        &linger {
            l_onoff: 1,
            l_linger: 0,
        },
    )
    .context("SO_LINGER")?;
    // Bound ahead, so that its port is known however it ends.
    bind(fd.as_raw_fd(), &SockaddrIn::new(0, 0, 0, 0, 0)).context("bind a socket")?;
    let begun = connect(fd.as_raw_fd(), &SockaddrIn::from(server));
    let mut outcome = match begun {
        Ok(()) => Ok(()),
        Err(Errno::EINPROGRESS) => {
            let mut polled = [PollFd::new(fd.as_fd(), PollFlags::POLLOUT)];
            let timeout = PollTimeout::try_from(LIMIT).unwrap_or(PollTimeout::MAX);
            match poll(&mut polled, timeout) {
                Ok(0) => Err(Errno::ETIMEDOUT),
                Ok(_) => Ok(()),
                Err(errno) => Err(errno),
            }
        }
        Err(errno) => Err(errno),
    };
    if outcome.is_ok() {
        outcome = match getsockopt(&fd, SocketError) {
            Ok(0) => Ok(()),
            Ok(number) => Err(Errno::from_raw(number)),
            Err(errno) => Err(errno),
        };
    }
    let stream = TcpStream::from(fd);
    let own_port = stream
        .local_addr()
        .context("ask for a socket's address")?
        .port();
    drop(stream);
    forget(server, own_port);
    Ok(match outcome {
        Ok(()) => Answer::Accepts,
        Err(Errno::ECONNREFUSED) => Answer::Refuses,
        Err(Errno::ETIMEDOUT) => Answer::Silent,
        Err(errno) => bail!("ask {server} for a connection: {}", errno.desc()),
    })
}

/// Removes the connection from the table, where it would be taken for a client's. What can't be removed ends by itself.
fn forget(server: SocketAddrV4, own_port: u16) {
    let ports = Some((own_port, server.port()));
    let own = conntrack::find([Filter::To(*server.ip())], |flow| {
        flow.original.ports == ports
    });
    if let Ok(own) = own {
        let _ = conntrack::end(&own);
    }
}
