#!/bin/sh
exec /usr/sbin/mh-hook event up "$@"
