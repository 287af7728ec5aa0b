package serviceaccount

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"skein.io/skein/scheduler/controller"
	"skein.io/skein/scheduler/controller/controllertest"
)

func namespace(name string, phase corev1.NamespacePhase) *corev1.Namespace {
	return &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, UID: "u", ResourceVersion: "1"}, Status: corev1.NamespaceStatus{Phase: phase}}
}

func TestEveryNamespaceIsFurnished(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		wrong := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: rootCA, ResourceVersion: "1"}, Data: map[string]string{caKey: "old", "more": "x"}}
		client := controllertest.NewClient(namespace("a", corev1.NamespaceActive), namespace("ending", corev1.NamespaceTerminating), wrong)
		controllertest.Start(t, client, func(d *controller.Deps) { d.RootCA = []byte("PEM") }, New)
		ctx, core := t.Context(), client.CoreV1()
		check := func(ns string) {
			t.Helper()
			time.Sleep(time.Second)
			synctest.Wait()
			if _, err := core.ServiceAccounts(ns).Get(ctx, account, metav1.GetOptions{}); err != nil {
				t.Error(err)
			}
			cm, err := core.ConfigMaps(ns).Get(ctx, rootCA, metav1.GetOptions{})
			if err != nil || len(cm.Data) != 1 || cm.Data[caKey] != "PEM" || cm.Annotations[annDescription] == "" {
				t.Errorf("ConfigMap %+v, %v", cm, err)
			}
		}
		check("a")
		if _, err := core.Namespaces().Create(ctx, namespace("b", ""), metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		check("b")

		if err := core.ServiceAccounts("b").Delete(ctx, account, metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		if err := core.ConfigMaps("a").Delete(ctx, rootCA, metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		check("a")
		check("b")

		l, _ := core.ConfigMaps("ending").List(ctx, metav1.ListOptions{})
		if len(l.Items) != 0 {
			t.Error("a namespace that ends was furnished")
		}
		client.ClearActions()
		time.Sleep(time.Hour)
		synctest.Wait()
		if a := client.Actions(); len(a) != 0 {
			t.Errorf("requests while nothing changes: %v", a)
		}
	})
}

func TestWithoutACertificateItDoesNotRun(t *testing.T) {
	client := controllertest.NewClient()
	c := New(controller.Deps{Client: client, Factory: controller.NewFactory(client)})
	if err := c.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "RootCA") {
		t.Errorf("Run: %v", err)
	}
}

func TestCorrectedKeepsWhatOthersAdded(t *testing.T) {
	have := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: rootCA, Labels: map[string]string{"l": "x"}}, Data: map[string]string{caKey: "PEM"}}
	got := corrected(have, "a", []byte("PEM"))
	if got == nil || got.Labels["l"] != "x" || have.Annotations != nil {
		t.Errorf("corrected %+v of %+v", got, have)
	}
	if corrected(got, "a", []byte("PEM")) != nil {
		t.Error("a right one is written again")
	}
}
