package main

import (
	"fmt"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/controller-runtime/pkg/conversion"
)

// The group has two versions: v1, in which a gadget has a size, is stored; v1alpha1 called it width.
var (
	v1      = schema.GroupVersion{Group: "clients.skein.io", Version: "v1"}
	v1alpha = schema.GroupVersion{Group: "clients.skein.io", Version: "v1alpha1"}
)

// Gadget is what the operator looks after: for each there is a ConfigMap of its name that has its size.
type Gadget struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`
	Spec              GadgetSpec   `json:"spec"`
	Status            GadgetStatus `json:"status,omitempty"`
}

// GadgetSpec is what a gadget should be.
type GadgetSpec struct {
	Size  int64  `json:"size"`
	Color string `json:"color,omitempty"`
}

// GadgetStatus is what has been done.
type GadgetStatus struct {
	Size       int64  `json:"size,omitempty"`
	Generation int64  `json:"observedGeneration,omitempty"`
	By         string `json:"by,omitempty"`
}

// GadgetList is a list of them.
type GadgetList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []Gadget `json:"items"`
}

// Hub makes v1 the version that all others are converted through.
func (*Gadget) Hub() {}

// DeepCopyObject implements runtime.Object.
func (g *Gadget) DeepCopyObject() runtime.Object { return g.copy() }

func (g *Gadget) copy() *Gadget {
	out := *g
	out.ObjectMeta = *g.ObjectMeta.DeepCopy()
	return &out
}

// DeepCopyObject implements runtime.Object.
func (l *GadgetList) DeepCopyObject() runtime.Object {
	out := *l
	out.ListMeta = *l.ListMeta.DeepCopy()
	out.Items = make([]Gadget, len(l.Items))
	for i := range l.Items {
		out.Items[i] = *l.Items[i].copy()
	}
	return &out
}

// OldGadget is a gadget in v1alpha1.
type OldGadget struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`
	Spec              struct {
		Width string `json:"width"`
		Color string `json:"color,omitempty"`
	} `json:"spec"`
	Status GadgetStatus `json:"status,omitempty"`
}

// DeepCopyObject implements runtime.Object.
func (g *OldGadget) DeepCopyObject() runtime.Object {
	out := *g
	out.ObjectMeta = *g.ObjectMeta.DeepCopy()
	return &out
}

// ConvertTo implements conversion.Convertible.
func (g *OldGadget) ConvertTo(hub conversion.Hub) error {
	dst := hub.(*Gadget)
	dst.ObjectMeta, dst.Status, dst.Spec.Color = g.ObjectMeta, g.Status, g.Spec.Color
	_, err := fmt.Sscanf(g.Spec.Width, "%dmm", &dst.Spec.Size)
	if err != nil {
		return fmt.Errorf("width %q is not like 5mm: %w", g.Spec.Width, err)
	}
	return nil
}

// ConvertFrom implements conversion.Convertible.
func (g *OldGadget) ConvertFrom(hub conversion.Hub) error {
	src := hub.(*Gadget)
	g.ObjectMeta, g.Status, g.Spec.Color = src.ObjectMeta, src.Status, src.Spec.Color
	g.Spec.Width = fmt.Sprintf("%dmm", src.Spec.Size)
	return nil
}

func addTypes(s *runtime.Scheme) {
	s.AddKnownTypeWithName(v1.WithKind("Gadget"), &Gadget{})
	s.AddKnownTypeWithName(v1.WithKind("GadgetList"), &GadgetList{})
	s.AddKnownTypeWithName(v1alpha.WithKind("Gadget"), &OldGadget{})
	metav1.AddToGroupVersion(s, v1)
	metav1.AddToGroupVersion(s, v1alpha)
}
