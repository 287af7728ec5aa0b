package machine

import (
	"testing"
	"time"
)

func TestRead(t *testing.T) {
	r := Read()
	if r.MemoryTotal <= 0 || r.MemoryAvailable <= 0 || r.MemoryAvailable > r.MemoryTotal || r.PIDs <= 0 || r.MaxPIDs <= r.PIDs {
		t.Errorf("%+v", r)
	}
	d, err := Disk(t.TempDir())
	if err != nil || d.Total <= 0 || d.Available > d.Total {
		t.Errorf("%+v %v", d, err)
	}
	if i := Info(); i.KernelVersion == "" || i.BootID == "" || i.OSImage == "" {
		t.Errorf("%+v", i)
	}
	if _, err := Disk("/nonexistent"); err == nil {
		t.Error("no error for a directory that does not exist")
	}
}

func TestJudge(t *testing.T) {
	now := time.Unix(1000, 0)
	fine := Reading{MemoryTotal: 8 << 30, MemoryAvailable: 4 << 30, PIDs: 100, MaxPIDs: 32768}
	disk := DiskReading{Total: 100 << 30, Available: 50 << 30, Inodes: 1000, InodesFree: 500}
	if p := Judge(Pressure{}, fine, disk, now); p.Memory.On || p.Disk.On || p.PIDs.On {
		t.Errorf("%+v", p)
	}
	if p := Judge(Pressure{}, Reading{}, DiskReading{}, now); p.Memory.On || p.Disk.On || p.PIDs.On {
		t.Errorf("what cannot be read counts as pressure: %+v", p)
	}
	short, full, crowded := fine, disk, fine
	short.MemoryAvailable = 50 << 20
	full.Available = 5 << 30
	crowded.PIDs = 32000
	if p := Judge(Pressure{}, short, disk, now); !p.Memory.On {
		t.Error("memory")
	}
	p := Judge(Pressure{}, crowded, full, now)
	if !p.Disk.On || !p.PIDs.On {
		t.Errorf("%+v", p)
	}
	if p = Judge(p, fine, disk, now.Add(4*time.Minute)); !p.Disk.On {
		t.Error("gone at once: it would flap")
	}
	if p = Judge(p, fine, disk, now.Add(6*time.Minute)); p.Disk.On {
		t.Error("not gone after its time")
	}
	inodes := disk
	inodes.InodesFree = 10
	if !Judge(Pressure{}, fine, inodes, now).Disk.On {
		t.Error("inodes")
	}
}
