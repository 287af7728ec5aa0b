package loader

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"

	"skein.io/skein/datapath/bpf"
	"skein.io/skein/datapath/service"
)

// LayoutVersion changes when the MEANING of an entry changes; sizes, types and limits are part of the layout anyhow.
const LayoutVersion = 1

// Loader owns the kernel side of one node's datapath.
type Loader struct {
	cfg     Config
	layout  string // directory of the tables
	coll    *ebpf.Collection
	have    service.Entries // mirror of the service tables
	stale   bool            // a step failed: read the tables again first
	active  bool            // programs of this layout are attached
	network Network
	faults  error // of the last services
}

// Open loads the programs, opens or creates the tables and attaches everything. If the pinned tables have another
// layout (an upgrade), the old programs go on with the old tables until the first ApplyServices has filled the new ones.
func Open(cfg Config) (_ *Loader, err error) {
	cfg.setDefaults()
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if err := checkHost(cfg); err != nil {
		return nil, err
	}
	if err := mountBPF(cfg.Dir); err != nil {
		return nil, err
	}
	if pins, listErr := os.ReadDir(filepath.Join(cfg.Dir, linksName)); errors.Is(listErr, fs.ErrNotExist) || listErr == nil && len(pins) == 0 {
		defer func() {
			if err != nil { // nothing was attached before, so nothing stays half attached
				err = errors.Join(err, Detach(cfg.Dir))
			}
		}()
	}
	spec, err := bpf.LoadSkein()
	if err != nil {
		return nil, fmt.Errorf("datapath: read the embedded programs: %w", err)
	}
	sizeMaps(spec, cfg)
	l := &Loader{cfg: cfg, layout: filepath.Join(cfg.Dir, layoutName(spec))}
	others, err := l.otherLayouts()
	if err != nil {
		return nil, err
	}
	_, statErr := os.Stat(l.layout)
	fresh := errors.Is(statErr, fs.ErrNotExist)
	for _, dir := range []string{l.layout, l.linkDir()} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("datapath: make %s: %w", dir, err)
		}
	}
	if err := l.load(spec); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			l.coll.Close()
		}
	}()
	if err := l.putConfig(); err != nil {
		return nil, err
	}
	if l.have, err = l.readBack(); err != nil {
		return nil, err
	}
	if fresh && len(others) > 0 {
		cfg.Logger.Info("tables have a new layout, old ones stay in use until the new ones are filled", "layout", filepath.Base(l.layout), "old", others)
		return l, nil
	}
	if err := l.activate(); err != nil {
		return nil, err
	}
	return l, nil
}

func (l *Loader) load(spec *ebpf.CollectionSpec) error {
	if err := rlimit.RemoveMemlock(); err != nil {
		return fmt.Errorf("datapath: lift the limit on locked memory: %w", err)
	}
	for _, m := range spec.Maps {
		m.Pinning = ebpf.PinByName
	}
	coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{Maps: ebpf.MapOptions{PinPath: l.layout}})
	if err != nil {
		return explain("load programs and tables", err)
	}
	l.coll = coll
	return nil
}

// ApplyServices makes the tables show exactly these services. What is wrong with single services (IPv6, a front end that two
// claim) hinders no other one and is no error, for trying again would not help: it is logged once, and Faults tells it.
func (l *Loader) ApplyServices(services []service.Service) error {
	if l.stale {
		have, err := l.readBack()
		if err != nil {
			return err
		}
		l.have, l.stale = have, false
	}
	want, faults := service.Translate(l.have, services, l.cfg.Node)
	if faults != nil && (l.faults == nil || faults.Error() != l.faults.Error()) {
		l.cfg.Logger.Warn("parts of Services are left out", "why", faults)
	}
	l.faults = faults
	if n := len(want.Frontends); n > l.cfg.MaxFrontends {
		return fmt.Errorf("datapath: %d front ends, but the table holds %d: raise the limit; nothing was changed", n, l.cfg.MaxFrontends)
	}
	if n := len(want.Slots); n > l.cfg.MaxBackends {
		return fmt.Errorf("datapath: %d back ends, but the table holds %d: raise the limit; nothing was changed", n, l.cfg.MaxBackends)
	}
	ops := service.Diff(l.have, want)
	for i, op := range ops {
		if err := l.do(op); err != nil {
			l.stale = true
			return fmt.Errorf("datapath: step %d of %d: %w", i+1, len(ops), err)
		}
		l.have.Apply(op)
	}
	if !l.active {
		return l.activate()
	}
	return nil
}

// Faults tells what the last ApplyServices had to leave out and why; nil = nothing.
func (l *Loader) Faults() error { return l.faults }

func (l *Loader) do(op service.Op) error {
	m := l.coll.Maps[map[service.Table]string{service.Frontends: bpf.SkeinMapSkFe, service.Slots: bpf.SkeinMapSkBe, service.Members: bpf.SkeinMapSkMb}[op.Table]]
	if op.Value == nil {
		if err := m.Delete(op.Key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("delete %v from %s: %w", op.Key, op.Table, err)
		}
		return nil
	}
	if err := m.Put(op.Key, op.Value); err != nil {
		return fmt.Errorf("write %v to %s: %w", op.Key, op.Table, err)
	}
	return nil
}

// readBack reads the service tables as they are.
func (l *Loader) readBack() (service.Entries, error) {
	e := service.NewEntries()
	err := errors.Join(
		readMap(l.coll.Maps[bpf.SkeinMapSkFe], e.Frontends),
		readMap(l.coll.Maps[bpf.SkeinMapSkBe], e.Slots),
		readMap(l.coll.Maps[bpf.SkeinMapSkMb], e.Members))
	return e, err
}

func readMap[K comparable, V any](m *ebpf.Map, into map[K]V) error {
	var k K
	var v V
	it := m.Iterate()
	for it.Next(&k, &v) {
		into[k] = v
	}
	if err := it.Err(); err != nil {
		return fmt.Errorf("datapath: read table %s back: %w", m, err)
	}
	return nil
}

// activate attaches this layout's programs, or puts them in the place of older ones, and drops older layouts.
func (l *Loader) activate() error {
	if err := l.attachCgroup(); err != nil {
		return err
	}
	l.active = true // the devices are reconciled from here on
	if err := l.reconcileDevices(); err != nil {
		l.active = false
		return err
	}
	others, err := l.otherLayouts()
	if err != nil {
		return err
	}
	for _, o := range others {
		if err := os.RemoveAll(filepath.Join(l.cfg.Dir, o)); err != nil {
			return fmt.Errorf("datapath: remove old layout: %w", err)
		}
	}
	return nil
}

// Close releases this process's handles; the kernel goes on as it is.
func (l *Loader) Close() error {
	l.coll.Close()
	return nil
}

// Detach removes everything below dir from the kernel: links, programs, tables, and the mount. It succeeds if nothing is there.
func Detach(dir string) error {
	if is, err := isBPFFS(dir); err != nil || !is {
		return err
	}
	// Links first: a pin that is only removed keeps its program attached as long as another process holds it open.
	pins, err := os.ReadDir(filepath.Join(dir, linksName))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("datapath: list links: %w", err)
	}
	for _, p := range pins {
		path := filepath.Join(dir, linksName, p.Name())
		if k, err := link.LoadPinnedLink(path, nil); err == nil {
			_ = k.Detach() // fails for a link whose cgroup or device is gone, which is detached already
			_ = k.Close()
		}
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("datapath: list pins: %w", err)
	}
	for _, e := range entries {
		if e.Name() != linksName && !strings.HasPrefix(e.Name(), layoutPrefix) {
			continue // the kernel's own files
		}
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return fmt.Errorf("datapath: remove pin: %w", err)
		}
	}
	if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) { // EINVAL: mounted higher up
		return fmt.Errorf("datapath: unmount %s: %w", dir, err)
	}
	return nil
}

// otherLayouts lists directories of tables that are not this program's.
func (l *Loader) otherLayouts() ([]string, error) {
	entries, err := os.ReadDir(l.cfg.Dir)
	if err != nil {
		return nil, fmt.Errorf("datapath: list pins: %w", err)
	}
	var out []string
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), layoutPrefix) && e.Name() != filepath.Base(l.layout) {
			out = append(out, e.Name())
		}
	}
	return out, nil
}
