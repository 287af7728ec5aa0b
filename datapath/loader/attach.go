package loader

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"skein.io/skein/datapath/bpf"
)

// hooks are the programs at the cgroup.
var hooks = []struct {
	prog string
	at   ebpf.AttachType
}{
	// The reverse side goes first: no socket may be translated whose replies are not.
	{bpf.SkeinProgSkRecvmsg4, ebpf.AttachCGroupUDP4Recvmsg},
	{bpf.SkeinProgSkRecvmsg6, ebpf.AttachCGroupUDP6Recvmsg},
	{bpf.SkeinProgSkGetpeer4, ebpf.AttachCgroupInet4GetPeername},
	{bpf.SkeinProgSkGetpeer6, ebpf.AttachCgroupInet6GetPeername},
	{bpf.SkeinProgSkConnect4, ebpf.AttachCGroupInet4Connect},
	{bpf.SkeinProgSkConnect6, ebpf.AttachCGroupInet6Connect},
	{bpf.SkeinProgSkSendmsg4, ebpf.AttachCGroupUDP4Sendmsg},
}

func (l *Loader) attachCgroup() error {
	var st unix.Stat_t
	if err := unix.Stat(l.cfg.CgroupPath, &st); err != nil {
		return fmt.Errorf("datapath: stat %s: %w", l.cfg.CgroupPath, err)
	}
	for _, h := range hooks {
		prog := l.coll.Programs[h.prog]
		err := l.attach(h.prog, prog,
			func(i *link.Info) bool { c := i.Cgroup(); return c != nil && c.CgroupId == st.Ino },
			func() (link.Link, error) {
				return link.AttachCgroup(link.CgroupOptions{Path: l.cfg.CgroupPath, Attach: h.at, Program: prog})
			})
		if err != nil {
			return explain(fmt.Sprintf("attach %s to %s", h.prog, l.cfg.CgroupPath), err)
		}
	}
	return nil
}

// attach puts prog behind the link pinned as name. A link that is still on its object gets the new program in place, with
// no moment without one. A link whose cgroup or device was removed can still be loaded and updated, and does nothing:
// so valid compares the object's number, and what fails is made anew.
func (l *Loader) attach(name string, prog *ebpf.Program, valid func(*link.Info) bool, create func() (link.Link, error)) error {
	pin := filepath.Join(l.linkDir(), name)
	old, err := link.LoadPinnedLink(pin, nil)
	if err == nil {
		defer old.Close()
		info, err := old.Info()
		if err == nil && valid(info) {
			if err := old.Update(prog); err != nil {
				return fmt.Errorf("update: %w", err)
			}
			return nil
		}
		l.cfg.Logger.Info("link points to something that was removed, attaching again", "link", name)
		_ = old.Detach() // or it stays with its former cgroup, if the configuration names another now
		if err := old.Unpin(); err != nil {
			return fmt.Errorf("remove stale pin: %w", err)
		}
	} else if !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("load pinned link: %w", err)
	}
	k, err := create()
	if err != nil {
		return err
	}
	defer k.Close()
	if err := k.Pin(pin); err != nil {
		return fmt.Errorf("pin: %w", err)
	}
	return nil
}

// devVal is dev_val of maps.h.
type devVal struct {
	SNAT, PodNet, PodMask [4]byte
	L2Len, Flags          uint16
}

// lpmKey is lpm_key of maps.h.
type lpmKey struct {
	Bits uint32
	IP   [4]byte
}

const devMasquerade = 1

// ApplyNetwork makes the device programs follow n: which devices, which pods are masqueraded, and towards whom not.
func (l *Loader) ApplyNetwork(n Network) error {
	if n.PodCIDR.IsValid() && !n.PodCIDR.Addr().Is4() {
		return fmt.Errorf("datapath: pod CIDR %s is not IPv4", n.PodCIDR)
	}
	l.network = n
	if err := l.reconcileKeep(); err != nil {
		return err
	}
	return l.reconcileDevices()
}

func (l *Loader) reconcileKeep() error {
	m := l.coll.Maps[bpf.SkeinMapSkKeep]
	have := map[lpmKey]uint32{}
	if err := readMap(m, have); err != nil {
		return err
	}
	want := map[lpmKey]bool{}
	for _, p := range l.network.NoMasquerade {
		if !p.IsValid() || !p.Addr().Is4() {
			return fmt.Errorf("datapath: range %s is not IPv4", p)
		}
		want[lpmKey{uint32(p.Bits()), p.Masked().Addr().As4()}] = true
	}
	for k := range want {
		if _, ok := have[k]; !ok {
			if err := m.Put(k, uint32(1)); err != nil {
				return fmt.Errorf("datapath: write range without masquerade: %w", err)
			}
		}
	}
	for k := range have {
		if !want[k] {
			if err := m.Delete(k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
				return fmt.Errorf("datapath: delete range without masquerade: %w", err)
			}
		}
	}
	return nil
}

// reconcileDevices attaches to the wanted devices, refreshes their settings, and removes those of other devices.
func (l *Loader) reconcileDevices() error {
	if !l.active {
		return nil // the old layout's programs are still in charge; activate calls again
	}
	want := map[uint32]devVal{}
	devices := l.network.Devices
	if l.cfg.Uplink != "" {
		devices = append([]Device{{Name: l.cfg.Uplink, Addr: l.cfg.Node.Addrs[0]}}, devices...)
	}
	for _, d := range devices {
		dev, err := net.InterfaceByName(d.Name)
		if err != nil {
			return fmt.Errorf("%w: %s: %w", ErrNoDevice, d.Name, err)
		}
		v := devVal{SNAT: as4(d.Addr)}
		if len(dev.HardwareAddr) == 6 {
			v.L2Len = 14
		}
		if d.Name == l.cfg.Uplink && l.network.PodCIDR.IsValid() {
			v.Flags = devMasquerade
			v.PodNet = l.network.PodCIDR.Masked().Addr().As4()
			copy(v.PodMask[:], net.CIDRMask(l.network.PodCIDR.Bits(), 32))
		}
		want[uint32(dev.Index)] = v
	}
	m := l.coll.Maps[bpf.SkeinMapSkDev]
	have := map[uint32]devVal{}
	if err := readMap(m, have); err != nil {
		return err
	}
	for i, v := range want {
		if old, ok := have[i]; !ok || old != v {
			if err := m.Put(i, v); err != nil {
				return fmt.Errorf("datapath: write settings of device %d: %w", i, err)
			}
		}
		if err := l.attachDevice(int(i)); err != nil {
			return err
		}
	}
	for i := range have {
		if _, ok := want[i]; !ok {
			if err := m.Delete(i); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
				return fmt.Errorf("datapath: delete settings of device %d: %w", i, err)
			}
		}
	}
	return l.dropDeviceLinks(want)
}

const tcxPrefix = "tcx-"

func (l *Loader) attachDevice(index int) error {
	for _, h := range []struct {
		prog   string
		at     ebpf.AttachType
		anchor link.Anchor
	}{
		// Next to the wire on both ways, so that other programs on the device see the addresses that the node uses.
		{bpf.SkeinProgSkEgress, ebpf.AttachTCXEgress, link.Tail()},
		{bpf.SkeinProgSkIngress, ebpf.AttachTCXIngress, link.Head()},
	} {
		prog := l.coll.Programs[h.prog]
		err := l.attach(fmt.Sprintf("%s%s-%d", tcxPrefix, h.prog, index), prog,
			func(i *link.Info) bool { t := i.TCX(); return t != nil && int(t.Ifindex) == index },
			func() (link.Link, error) {
				return link.AttachTCX(link.TCXOptions{Interface: index, Program: prog, Attach: h.at, Anchor: h.anchor})
			})
		if err != nil {
			return explain(fmt.Sprintf("attach %s to device %d", h.prog, index), err)
		}
	}
	return nil
}

// dropDeviceLinks removes links to devices that are not wanted any more (or are gone).
func (l *Loader) dropDeviceLinks(want map[uint32]devVal) error {
	pins, err := os.ReadDir(l.linkDir())
	if err != nil {
		return fmt.Errorf("datapath: list links: %w", err)
	}
	for _, p := range pins {
		if !strings.HasPrefix(p.Name(), tcxPrefix) {
			continue
		}
		index, err := strconv.ParseUint(p.Name()[strings.LastIndexByte(p.Name(), '-')+1:], 10, 32)
		if _, ok := want[uint32(index)]; ok && err == nil {
			continue
		}
		pin := filepath.Join(l.linkDir(), p.Name())
		if k, err := link.LoadPinnedLink(pin, nil); err == nil {
			_ = k.Detach() // fails if the device is gone
			_ = k.Close()
		}
		if err := os.Remove(pin); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("datapath: remove link: %w", err)
		}
	}
	return nil
}

func as4(a netip.Addr) (b [4]byte) {
	if a.Is4() {
		b = a.As4()
	}
	return b
}
