package loader

import (
	"bufio"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"skein.io/skein/datapath/bpf"
)

const (
	layoutPrefix = "tables-"
	linksName    = "links"
)

// Faults of the machine that only its owner can mend; the message says how.
var (
	ErrNotRoot  = errors.New("datapath: loading eBPF programs needs root (CAP_BPF, CAP_NET_ADMIN, CAP_SYS_ADMIN): run as root")
	ErrNoBPFFS  = errors.New("datapath: the bpf file system cannot be mounted: the kernel needs CONFIG_BPF_SYSCALL, and a container needs to be privileged")
	ErrNoCgroup = errors.New("datapath: not a directory of cgroup v2: mount it with `mount -t cgroup2 none /sys/fs/cgroup` (or boot with systemd.unified_cgroup_hierarchy=1) and create the cgroup first")
	ErrOldKern  = errors.New("datapath: this kernel cannot attach eBPF programs as links to devices (tcx): Linux 6.6 or newer with CONFIG_NET_XGRESS is needed")
	ErrNoDevice = errors.New("datapath: no such network device")
)

// Cgroup2Mount finds where cgroup v2 is mounted: /sys/fs/cgroup, or /sys/fs/cgroup/unified beside version 1.
func Cgroup2Mount() (string, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return "", fmt.Errorf("datapath: find cgroup v2: %w", err)
	}
	defer f.Close()
	sc := bufio.NewScanner(f)
	for sc.Scan() {
		// man 5 proc: ID parent major:minor root mount-point options [optional...] - type source super-options
		before, after, ok := strings.Cut(sc.Text(), " - ")
		fields := strings.Fields(before)
		if ok && strings.HasPrefix(after, "cgroup2 ") && len(fields) > 4 && fields[3] == "/" {
			return fields[4], nil
		}
	}
	if err := sc.Err(); err != nil {
		return "", fmt.Errorf("datapath: find cgroup v2: %w", err)
	}
	return "", ErrNoCgroup
}

func checkHost(cfg Config) error {
	if os.Geteuid() != 0 {
		return ErrNotRoot
	}
	var st unix.Statfs_t
	if err := unix.Statfs(cfg.CgroupPath, &st); err != nil {
		return fmt.Errorf("%w: %s: %w", ErrNoCgroup, cfg.CgroupPath, err)
	}
	if st.Type != unix.CGROUP2_SUPER_MAGIC {
		return fmt.Errorf("%w: %s", ErrNoCgroup, cfg.CgroupPath)
	}
	if cfg.Uplink != "" {
		if _, err := net.InterfaceByName(cfg.Uplink); err != nil {
			return fmt.Errorf("%w: %s: %w", ErrNoDevice, cfg.Uplink, err)
		}
	}
	return nil
}

func isBPFFS(dir string) (bool, error) {
	var st unix.Statfs_t
	err := unix.Statfs(dir, &st)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("datapath: stat %s: %w", dir, err)
	}
	return st.Type == unix.BPF_FS_MAGIC, nil
}

func mountBPF(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("datapath: make %s: %w", dir, err)
	}
	is, err := isBPFFS(dir)
	if err != nil || is {
		return err
	}
	if err := unix.Mount("bpf", dir, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
		return fmt.Errorf("%w: %s: %w", ErrNoBPFFS, dir, err)
	}
	return nil
}

// explain puts what to do in front of errors of the kernel that say little.
func explain(what string, err error) error {
	switch {
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("%w (%s: %w)", ErrNotRoot, what, err)
	case errors.Is(err, ebpf.ErrNotSupported):
		return fmt.Errorf("%w (%s: %w)", ErrOldKern, what, err)
	}
	return fmt.Errorf("datapath: %s: %w", what, err)
}

func sizeMaps(spec *ebpf.CollectionSpec, cfg Config) {
	for name, n := range map[string]int{
		bpf.SkeinMapSkFe: cfg.MaxFrontends, bpf.SkeinMapSkBe: cfg.MaxBackends, bpf.SkeinMapSkMb: cfg.MaxBackends,
		bpf.SkeinMapSkCtIn: cfg.MaxFlows, bpf.SkeinMapSkCtOut: cfg.MaxFlows,
	} {
		spec.Maps[name].MaxEntries = uint32(n)
	}
}

// layoutName names a layout by LayoutVersion and everything that decides whether tables can be shared. No dots: the bpf
// file system reserves them.
func layoutName(spec *ebpf.CollectionSpec) string {
	var lines []string
	for name, m := range spec.Maps {
		lines = append(lines, fmt.Sprint(name, m.Type, m.KeySize, m.ValueSize, m.MaxEntries, m.Flags))
	}
	slices.Sort(lines)
	sum := sha256.Sum256([]byte(strings.Join(lines, "\n")))
	return fmt.Sprintf("%sv%d-%x", layoutPrefix, LayoutVersion, sum[:4])
}

// cfgVal is cfg_val of maps.h.
type cfgVal struct {
	Netns            uint64
	SNATMin, SNATMax uint16
	Pad              uint32
}

func (l *Loader) putConfig() error {
	cookie, err := netnsCookie()
	if err != nil {
		return err
	}
	v := cfgVal{Netns: cookie, SNATMin: l.cfg.SNATPorts[0], SNATMax: l.cfg.SNATPorts[1]}
	if err := l.coll.Maps[bpf.SkeinMapSkCfg].Put(uint32(0), v); err != nil {
		return fmt.Errorf("datapath: write the node's settings: %w", err)
	}
	if l.cfg.Uplink == "" {
		return nil
	}
	return reservePorts("/proc/sys/net/ipv4/ip_local_reserved_ports", l.cfg.SNATPorts)
}

// netnsCookie is the kernel's number of this thread's network namespace.
func netnsCookie() (uint64, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("datapath: socket: %w", err)
	}
	defer unix.Close(fd)
	c, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if err != nil {
		return 0, fmt.Errorf("datapath: cookie of the network namespace: %w", err)
	}
	return c, nil
}

// reservePorts keeps the kernel from giving the ports of rewritten flows to sockets of the node.
func reservePorts(file string, ports [2]uint16) error {
	b, err := os.ReadFile(file)
	if err != nil {
		return fmt.Errorf("datapath: %w", err)
	}
	text, changed := withPorts(strings.TrimSpace(string(b)), ports)
	if !changed {
		return nil
	}
	if err := os.WriteFile(file, []byte(text), 0); err != nil {
		return fmt.Errorf("datapath: reserve ports %d-%d: %w", ports[0], ports[1], err)
	}
	return nil
}

// withPorts adds a range to a list like "8080,9000-9010" unless one of its ranges covers it.
func withPorts(list string, ports [2]uint16) (string, bool) {
	for r := range strings.SplitSeq(list, ",") {
		from, to, ok := strings.Cut(r, "-")
		if !ok {
			to = from
		}
		a, errA := strconv.Atoi(from)
		b, errB := strconv.Atoi(to)
		if errA == nil && errB == nil && a <= int(ports[0]) && b >= int(ports[1]) {
			return list, false
		}
	}
	add := fmt.Sprintf("%d-%d", ports[0], ports[1])
	if list == "" {
		return add, true
	}
	return list + "," + add, true
}

func (l *Loader) linkDir() string { return filepath.Join(l.cfg.Dir, linksName) }
