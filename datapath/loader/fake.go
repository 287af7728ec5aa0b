package loader

import (
	"errors"
	"slices"
	"sync"

	"skein.io/skein/datapath/service"
)

// Fake stands in for a Loader where no kernel may be touched: it translates like one and keeps the entries in memory. Unlike
// a Loader it may be used from several goroutines, so that tests can look at it. The zero value is not usable; see NewFake.
type Fake struct {
	mu       sync.Mutex // guards all
	self     service.Node
	entries  service.Entries
	services []service.Service
	network  Network
	closed   bool
	fail     error
	faults   error
}

// ErrClosed is returned by a Fake after Close.
var ErrClosed = errors.New("datapath: closed")

// NewFake makes a Fake of a node.
func NewFake(self service.Node) *Fake { return &Fake{self: self, entries: service.NewEntries()} }

// Fail makes every later call return err; nil ends that.
func (f *Fake) Fail(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fail = err
}

func (f *Fake) broken() error {
	if f.closed {
		return ErrClosed
	}
	return f.fail
}

// ApplyServices is Loader.ApplyServices.
func (f *Fake) ApplyServices(services []service.Service) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.broken(); err != nil {
		return err
	}
	want, faults := service.Translate(f.entries, services, f.self)
	for _, op := range service.Diff(f.entries, want) {
		f.entries.Apply(op)
	}
	f.services, f.faults = slices.Clone(services), faults
	return nil
}

// Faults is Loader.Faults.
func (f *Fake) Faults() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.faults
}

// ApplyNetwork is Loader.ApplyNetwork.
func (f *Fake) ApplyNetwork(n Network) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.broken(); err != nil {
		return err
	}
	f.network = n
	return nil
}

// Close is Loader.Close.
func (f *Fake) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = true
	return nil
}

// Services is what was applied last.
func (f *Fake) Services() []service.Service {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.services)
}

// Network is what was applied last.
func (f *Fake) Network() Network {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.network
}

// Backends is what a client of a front end would be led to.
func (f *Fake) Backends(k service.FrontendKey) (out []service.BackendVal) {
	f.mu.Lock()
	defer f.mu.Unlock()
	v := f.entries.Frontends[k]
	for i := range v.Count {
		out = append(out, f.entries.Slots[service.SlotKey{Set: v.Set, Slot: i}])
	}
	return out
}
