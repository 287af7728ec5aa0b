// Package machine reads what the node's kernel says of itself: memory, disk, processes, identity; and judges pressure. Read
// functions may be called from any goroutine; Judge is pure.
package machine

import (
	"bufio"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/component-base/version"
)

// Reading is the state of memory and processes.
type Reading struct {
	MemoryTotal, MemoryAvailable int64 // bytes
	PIDs, MaxPIDs                int64
}

// Read reads /proc. What cannot be read stays zero, which counts as no pressure.
func Read() Reading {
	var r Reading
	if f, err := os.Open("/proc/meminfo"); err == nil {
		defer f.Close()
		sc := bufio.NewScanner(f)
		for sc.Scan() {
			switch f := strings.Fields(sc.Text()); {
			case len(f) < 2:
			case f[0] == "MemTotal:":
				r.MemoryTotal = number(f[1]) << 10
			case f[0] == "MemAvailable:":
				r.MemoryAvailable = number(f[1]) << 10
			}
		}
	}
	r.MaxPIDs = number(line("/proc/sys/kernel/pid_max"))
	// The fourth field of loadavg is running/all tasks.
	if f := strings.Fields(line("/proc/loadavg")); len(f) > 3 {
		_, all, _ := strings.Cut(f[3], "/")
		r.PIDs = number(all)
	}
	return r
}

func line(name string) string {
	b, err := os.ReadFile(name)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

func number(s string) int64 {
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		return 0
	}
	return n
}

// DiskReading is the state of a filesystem.
type DiskReading struct{ Total, Available, Inodes, InodesFree int64 }

// Disk reads the filesystem of a directory.
func Disk(dir string) (DiskReading, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return DiskReading{}, fmt.Errorf("filesystem of %s: %w", dir, err)
	}
	bs := int64(st.Bsize) //nolint:unconvert // differs by architecture
	return DiskReading{int64(st.Blocks) * bs, int64(st.Bavail) * bs, int64(st.Files), int64(st.Ffree)}, nil
}

// Thresholds, kubelet's defaults for hard eviction (memory.available, nodefs.available, nodefs.inodesFree), and for PIDs,
// for which kubelet has none, a twentieth.
const (
	minMemory        = 100 << 20
	minDiskPercent   = 10
	minInodesPercent = 5
	minPIDsPercent   = 5
	// hold is how long pressure is reported after it has gone, so that it does not flap (pressure-transition-period).
	hold = 5 * time.Minute
)

// Signal is one kind of pressure.
type Signal struct {
	On bool
	// Last is when it was last seen.
	Last time.Time
}

// Pressure is all of it.
type Pressure struct{ Memory, Disk, PIDs Signal }

// Judge says what is short at now, given what was before.
func Judge(before Pressure, r Reading, d DiskReading, now time.Time) Pressure {
	next := func(s Signal, short bool) Signal {
		if short {
			return Signal{true, now}
		}
		return Signal{s.On && now.Sub(s.Last) < hold, s.Last}
	}
	short := func(free, total, percent int64) bool { return total > 0 && free*100 < total*percent }
	return Pressure{
		Memory: next(before.Memory, r.MemoryTotal > 0 && r.MemoryAvailable < min(minMemory, r.MemoryTotal/10)),
		Disk:   next(before.Disk, short(d.Available, d.Total, minDiskPercent) || short(d.InodesFree, d.Inodes, minInodesPercent)),
		PIDs:   next(before.PIDs, short(r.MaxPIDs-r.PIDs, r.MaxPIDs, minPIDsPercent)),
	}
}

// Info is the machine's and system's identity.
func Info() corev1.NodeSystemInfo {
	info := corev1.NodeSystemInfo{
		MachineID:      line("/etc/machine-id"),
		SystemUUID:     line("/sys/class/dmi/id/product_uuid"),
		BootID:         line("/proc/sys/kernel/random/boot_id"),
		KernelVersion:  line("/proc/sys/kernel/osrelease"),
		OSImage:        osImage(),
		KubeletVersion: version.Get().GitVersion,
	}
	if info.SystemUUID == "" {
		info.SystemUUID = info.MachineID
	}
	return info
}

func osImage() string {
	for _, name := range []string{"/etc/os-release", "/usr/lib/os-release"} {
		for _, l := range strings.Split(line(name), "\n") {
			if v, ok := strings.CutPrefix(l, "PRETTY_NAME="); ok {
				return strings.Trim(v, `"'`)
			}
		}
	}
	return "Linux"
}
