package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// memory of one process in bytes: all that is resident, and the part that no file
// backs.
type memory struct{ rss, anon float64 }

// memoryOf is the mean over processes.
func memoryOf(pids []int) (m memory, err error) {
	for _, p := range pids {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p))
		if err != nil {
			return m, err
		}
		for line := range strings.Lines(string(b)) {
			k, v, _ := strings.Cut(line, ":")
			n, _ := strconv.ParseFloat(strings.TrimSuffix(strings.TrimSpace(v), " kB"), 64)
			switch k {
			case "VmRSS":
				m.rss += n * 1024 / float64(len(pids))
			case "RssAnon":
				m.anon += n * 1024 / float64(len(pids))
			}
		}
	}
	return m, nil
}

// disk counts the flushes of the device under a directory.
type disk struct{ major, minor uint32 }

func diskOf(dir string) (disk, error) {
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return disk{}, fmt.Errorf("stat %s: %w", dir, err)
	}
	return disk{unix.Major(st.Dev), unix.Minor(st.Dev)}, nil
}

// flushes since boot; false if the device has no volatile cache, is not a disk, or
// the kernel does not count them.
func (d disk) flushes() (uint64, bool) {
	b, err := os.ReadFile("/proc/diskstats")
	if err != nil {
		return 0, false
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) < 20 || f[0] != fmt.Sprint(d.major) || f[1] != fmt.Sprint(d.minor) {
			continue
		}
		n, err := strconv.ParseUint(f[18], 10, 64)
		return n, err == nil && n > 0
	}
	return 0, false
}

// syncRate is how many writes of size bytes the disk makes durable a second, one
// after the other, appended to a file and into one that exists.
func syncRate(dir string, size int, d time.Duration) (appended, inPlace float64, err error) {
	rate := func(preallocate bool) (r float64, err error) {
		path := filepath.Join(dir, "syncrate")
		f, err := os.Create(path)
		if err != nil {
			return 0, err
		}
		defer func() { err = errors.Join(err, f.Close(), os.Remove(path)) }()
		const room = 16 << 20
		if preallocate {
			if _, err := f.Write(make([]byte, room)); err != nil {
				return 0, err
			}
			if err := f.Sync(); err != nil {
				return 0, err
			}
		}
		b := bytes.Repeat([]byte{1}, size)
		start, n := time.Now(), 0
		for ; time.Since(start) < d; n++ {
			if _, err := f.WriteAt(b, int64(n*size)%(room-int64(size))); err != nil {
				return 0, err
			}
			if err := unix.Fdatasync(int(f.Fd())); err != nil {
				return 0, err
			}
		}
		return float64(n) / time.Since(start).Seconds(), nil
	}
	if appended, err = rate(false); err != nil {
		return 0, 0, fmt.Errorf("measure the disk: %w", err)
	}
	if inPlace, err = rate(true); err != nil {
		return 0, 0, fmt.Errorf("measure the disk: %w", err)
	}
	return appended, inPlace, nil
}
