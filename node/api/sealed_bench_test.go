package api

import (
	"crypto/rand"
	"fmt"
	"runtime"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apiserver/pkg/storage/value"
	"k8s.io/client-go/kubernetes"

	"skein.io/skein/consensus/keyring"
	"skein.io/skein/node/api/encrypt"
)

const objectSize = 1024 // bytes of a typical Secret

// BenchmarkSeal measures what sealing adds to the write and the read of one object, and what upstream's cache of derived keys holds for
// each object that was read in the last ten minutes.
func BenchmarkSeal(b *testing.B) {
	ring, err := keyring.New(rand.Reader, time.Now())
	if err != nil {
		b.Fatal(err)
	}
	ctx, object := b.Context(), make([]byte, objectSize)
	at := func(i int) value.DefaultContext {
		return value.DefaultContext(fmt.Sprintf("/registry/secrets/default/s%d", i))
	}
	b.Run("write", func(b *testing.B) {
		t := encrypt.New(encrypt.Fixed(ring)).Sealed()
		b.ReportAllocs()
		for i := 0; b.Loop(); i++ {
			if _, err := t.TransformToStorage(ctx, object, at(i%1000)); err != nil {
				b.Fatal(err)
			}
		}
	})
	const many = 10000
	t := encrypt.New(encrypt.Fixed(ring)).Sealed()
	stored := make([][]byte, many)
	for i := range stored {
		if stored[i], err = t.TransformToStorage(ctx, object, at(i)); err != nil {
			b.Fatal(err)
		}
	}
	read := func(t value.Transformer, i int) {
		if _, stale, err := t.TransformFromStorage(ctx, stored[i], at(i)); err != nil || stale {
			b.Fatal(stale, err)
		}
	}
	b.Run("first read", func(b *testing.B) {
		b.ReportAllocs()
		t := encrypt.New(encrypt.Fixed(ring)).Sealed()
		for i := 0; b.Loop(); i++ {
			if i%many == 0 {
				t = encrypt.New(encrypt.Fixed(ring)).Sealed()
			}
			read(t, i%many)
		}
	})
	b.Run("read again", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			read(t, 0)
		}
	})
	b.Run("memory", func(b *testing.B) {
		for b.Loop() {
			t := encrypt.New(encrypt.Fixed(ring)).Sealed()
			before := heap()
			for i := range many {
				read(t, i)
			}
			b.ReportMetric(float64(heap()-before)/many, "B/object")
			runtime.KeepAlive(t)
		}
	})
}

func heap() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// BenchmarkAPI compares Secrets, which are sealed, with ConfigMaps of the same size, which are not, through the whole API, by CPU time
// of this process: client, server and store together.
func BenchmarkAPI(b *testing.B) {
	k, err := kubernetes.NewForConfig(cluster.as(cluster.servers[0], "admin", "system:masters"))
	if err != nil {
		b.Fatal(err)
	}
	text := string(make([]byte, objectSize))
	make1 := map[string]func(string) error{
		"Secret": func(n string) error {
			_, err := k.CoreV1().Secrets("default").Create(b.Context(), &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: n}, Data: map[string][]byte{"a": []byte(text)}}, metav1.CreateOptions{})
			return err
		},
		"ConfigMap": func(n string) error {
			_, err := k.CoreV1().ConfigMaps("default").Create(b.Context(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: n}, BinaryData: map[string][]byte{"a": []byte(text)}}, metav1.CreateOptions{})
			return err
		},
	}
	get1 := map[string]func(string) error{
		"Secret": func(n string) error {
			_, err := k.CoreV1().Secrets("default").Get(b.Context(), n, metav1.GetOptions{})
			return err
		},
		"ConfigMap": func(n string) error {
			_, err := k.CoreV1().ConfigMaps("default").Get(b.Context(), n, metav1.GetOptions{})
			return err
		},
	}
	run := time.Now().UnixNano()
	for _, kind := range []string{"ConfigMap", "Secret", "ConfigMap", "Secret"} {
		for verb, f := range map[string]func(string) error{"create": make1[kind], "get": get1[kind]} {
			b.Run(kind+"/"+verb, func(b *testing.B) {
				run++
				first := fmt.Sprintf("b-%d-0", run)
				if verb == "get" {
					if err := make1[kind](first); err != nil {
						b.Fatal(err)
					}
				}
				before := cpu()
				for i := 0; b.Loop(); i++ {
					name := first
					if verb == "create" {
						run++
						name = fmt.Sprintf("b-%d-0", run)
					}
					if err := f(name); err != nil {
						b.Fatal(err)
					}
				}
				b.ReportMetric(float64((cpu()-before).Microseconds())/float64(b.N), "cpu-us/op")
			})
		}
	}
}

func cpu() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		panic(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
